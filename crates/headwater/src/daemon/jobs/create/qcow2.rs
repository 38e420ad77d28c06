//! `blockdev-create` of a qcow2 image, in a node that exists or is defined in place.
//!
//! What can't be is refused before the node is touched, in the words that scripts know from QEMU.

use super::super::stream::recorded_name;
use super::preallocation;
use crate::daemon::failure::{Refusal, generic, of_error};
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::{Doing, Rights};
use crate::daemon::graph::{Graph, GraphNode};
use headwater_image::Format;
use headwater_image::qcow2::create::{self, CreateOptions, Preallocation};
use headwater_image::qcow2::entry::Geometry;
use headwater_image::qcow2::header::{Compression, MAX_L1_BYTES};
use serde_json::Value;
use std::rc::Rc;

/// The largest disk that QEMU knows: what is left of 2^63 when whole GiB are cut off.
const MOST: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// Makes the image that `options` describe.
///
/// # Errors
/// If there is no such image, its nodes can't be had, or those of the storage.
pub(super) async fn make(graph: &Rc<Graph>, options: &Options) -> Result<(), Refusal> {
    let file = node(graph, options, "file").await?.ok_or_else(|| generic("Parameter 'file' is missing"))?;
    if options.contains_key("encrypt") {
        return Err(generic("Option 'encrypt' is not supported: no encrypted images are made"));
    }
    let mut create = described(options)?;
    let data = node(graph, options, "data-file").await?;
    if create.version == 2 && create.compression != Compression::Zlib {
        return Err(needs_v3("Non-zlib compression type is only supported with"));
    }
    let rights = Rights { does: Doing::READ.and(Doing::WRITE).and(Doing::RESIZE), bears: Doing::ALL };
    let mut roots = vec![graph.attach(&file, ("image creation", "file"), rights, false).await?];
    if let Some(data) = &data {
        roots.push(graph.attach(data, ("image creation", "data-file"), rights, false).await?);
        create.data_file =
            Some(recorded_name(&file.filename(), &graph.names_for_headers().told(&data.skip_filters())));
    }
    check_size(&create)?;
    let (top, preallocation) = (file.top(), create.preallocated());
    let made = async {
        create::create(&*top, &create).await?;
        top.flush().await?;
        match &data {
            Some(data) => {
                let data = data.top();
                create::set_size(&*data, create.size, preallocation).await?;
                data.flush().await
            }
            None => Ok(()),
        }
    }
    .await;
    drop(roots);
    made.map_err(|err| of_error(&err))
}

/// The node that the option `key` names or defines.
async fn node(graph: &Rc<Graph>, options: &Options, key: &str) -> Result<Option<Rc<GraphNode>>, Refusal> {
    match options.get(key) {
        Some(Value::String(name)) => graph.any(name).map(Some),
        Some(Value::Object(inline)) => graph.add(inline.clone(), false).await.map(Some),
        _ => Ok(None),
    }
}

fn needs_v3(what: &str) -> Refusal {
    generic(format!("{what} compatibility level 1.1 and above (use version=v3 or greater)"))
}

/// What the image is to be like, as far as no other node is needed for that.
///
/// # Errors
/// If options don't go together.
fn described(options: &Options) -> Result<CreateOptions, Refusal> {
    let size = options.number("size").unwrap_or(0);
    if !size.is_multiple_of(512) {
        return Err(generic("Image size must be a multiple of 512 bytes"));
    }
    let version = if options.text("version") == Some("v2") { 2 } else { 3 };
    let extended_l2 = options.flag("extended-l2").unwrap_or(false);
    if extended_l2 && version == 2 {
        return Err(needs_v3("Extended L2 entries are only supported with"));
    }
    let cluster_size = options.number("cluster-size").unwrap_or(64 << 10);
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return Err(generic("Cluster size must be a power of two between 512 and 2048k"));
    }
    if extended_l2 && cluster_size < 16 << 10 {
        return Err(generic(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let preallocation = preallocation(options);
    let backing = options.text("backing-file");
    if backing.is_some() && preallocation != Preallocation::Off && !extended_l2 {
        return Err(generic(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ));
    }
    if options.contains_key("backing-fmt") && backing.is_none() {
        return Err(generic("Backing format cannot be used without backing file"));
    }
    let lazy_refcounts = options.flag("lazy-refcounts").unwrap_or(false);
    if lazy_refcounts && version == 2 {
        return Err(needs_v3("Lazy refcounts only supported with"));
    }
    let refcount_bits = options
        .get("refcount-bits")
        .map_or(Some(16), |bits| bits.as_u64().and_then(|bits| u32::try_from(bits).ok()));
    let refcount_bits = refcount_bits
        .filter(|bits| bits.is_power_of_two() && *bits <= 64)
        .ok_or_else(|| generic("Refcount width must be a power of two and may not exceed 64 bits"))?;
    if refcount_bits != 16 && version == 2 {
        return Err(generic(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    }
    let data_file = options.contains_key("data-file");
    let data_file_raw = options.flag("data-file-raw").unwrap_or(false);
    if data_file_raw && !data_file {
        return Err(generic("data-file-raw requires data-file"));
    }
    if data_file_raw && backing.is_some() {
        return Err(generic("Backing file and data-file-raw cannot be used at the same time"));
    }
    if data_file && version == 2 {
        return Err(needs_v3("External data files are only supported with"));
    }
    let backing = match backing {
        Some(name) => {
            let format = options.text("backing-fmt").unwrap_or("raw");
            Some((name.to_owned(), Format::from_name(format, name).map_err(|err| of_error(&err))?))
        }
        None => None,
    };
    let zstd = options.text("compression-type") == Some("zstd");
    Ok(CreateOptions {
        version,
        cluster_size,
        refcount_bits,
        extended_l2,
        compression: if zstd { Compression::Zstd } else { Compression::Zlib },
        backing,
        data_file_raw,
        lazy_refcounts,
        preallocation,
        ..CreateOptions::new(size)
    })
}

/// Refuses disks that are too large.
fn check_size(create: &CreateOptions) -> Result<(), Refusal> {
    let size = create.size;
    let why = if i64::try_from(size).is_err() {
        "Image size cannot be negative".to_owned()
    } else if size > MOST {
        format!("offset({size}) exceeds maximum({MOST})")
    } else {
        let geometry = Geometry {
            version: create.version,
            cluster_bits: create.cluster_size.trailing_zeros(),
            refcount_order: create.refcount_bits.trailing_zeros(),
            extended_l2: create.extended_l2,
            data_file: create.data_file.is_some(),
        };
        if geometry.l1_entries_for(size) * 8 <= MAX_L1_BYTES {
            return Ok(());
        }
        "Failed to grow the L1 table: File too large".to_owned()
    };
    Err(generic(format!("Could not resize image: {why}")))
}
