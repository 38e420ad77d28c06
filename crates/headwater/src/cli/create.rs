//! `headwater create`: a new image, with the options of qemu-img.

use super::{FormatArg, OpenArgs};
use crate::failure::{Failure, Outcome};
use crate::opener::{Access, Opener};
use crate::runtime;
use crate::size::{human, parse_size};
use clap::Args;
use headwater_block::Node;
use headwater_image::Format;
use headwater_image::qcow2::create::{self, CreateOptions, Preallocation};
use headwater_image::qcow2::header::Compression;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Arguments of `create`.
#[derive(Debug, Clone, Args)]
pub struct CreateArgs {
    /// The format of the new image.
    #[arg(short, long, value_enum, default_value = "qcow2")]
    pub format: FormatArg,
    /// Options, NAME=VALUE,...: preallocation (off, falloc or full; of qcow2 also metadata); of qcow2 cluster_size, compat (0.10 or 1.1), refcount_bits,
    /// extended_l2 (on or off), compression_type (zlib or zstd), lazy_refcounts (on or off), data_file (a path that starts from the new image's directory; made if
    /// it isn't there) and data_file_raw (on or off). May be given several times.
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// The image that supplies what the new one lacks: a path that starts from the new image's directory, or a URI.
    #[arg(short, long, requires = "backing_format")]
    pub backing: Option<String>,
    /// The format of the backing.
    #[arg(short = 'F', long, value_enum)]
    pub backing_format: Option<FormatArg>,
    /// The new image.
    pub file: PathBuf,
    /// The disk's size (10G, 1.5T); without it, that of the backing.
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

/// Makes the image.
///
/// # Errors
/// If it exists already, can't be written, or the options make no image.
pub fn run(args: CreateArgs) -> Outcome {
    runtime::run(async move {
        let opener = Opener::new(&args.open)?;
        let size = size(&args, &opener).await?;
        match args.format {
            FormatArg::Raw => {
                if args.backing.is_some() {
                    return Err(Failure::new("a raw image has no backing; make a qcow2 image (-f qcow2)"));
                }
                let preallocation = of_raw(options(&args))?;
                let file = opener.create_file(&args.file)?;
                if !size.is_multiple_of(u64::from(file.limits().write_alignment)) {
                    file.use_buffered()?;
                }
                create::set_size(&*file, size, preallocation).await?;
                file.close().await?;
            }
            FormatArg::Qcow2 => {
                let mut create = CreateOptions::new(size);
                options(&args).try_for_each(|option| apply(&mut create, option))?;
                let format = args.backing_format.map(Into::into);
                create.backing = args.backing.clone().zip(format);
                opener.create_qcow2(&args.file, &create).await?;
                if let Some(data_file) = &create.data_file {
                    let data_file = args.file.parent().unwrap_or(Path::new("")).join(data_file);
                    let made = make_data_file(&opener, &data_file, &create).await;
                    if made.is_err() {
                        // It is no image without that.
                        let _ = std::fs::remove_file(&args.file);
                    }
                    made?;
                }
            }
        }
        println!("{}: {} of {}", args.file.display(), name(args.format), human(size));
        Ok(())
    })
}

/// The options that were given, one by one.
fn options(args: &CreateArgs) -> impl Iterator<Item = &str> {
    args.options.iter().flat_map(|list| list.split(',')).filter(|option| !option.is_empty())
}

/// The preallocation of a raw image, which is all that it can be told.
fn of_raw<'a>(options: impl Iterator<Item = &'a str>) -> Outcome<Preallocation> {
    let mut preallocation = Preallocation::Off;
    for text in options {
        preallocation = match text {
            "preallocation=off" => Preallocation::Off,
            "preallocation=falloc" => Preallocation::Falloc,
            "preallocation=full" => Preallocation::Full,
            _ => {
                let why = "a raw image knows preallocation=off, falloc or full, and nothing else; make a qcow2 image (-f qcow2)";
                return Err(Failure::new(format!("-o {text}: {why}")));
            }
        };
    }
    Ok(preallocation)
}

/// Makes the file that holds the data, or makes the one that is there large enough. What that holds stays.
async fn make_data_file(opener: &Opener, path: &Path, create: &CreateOptions) -> Outcome {
    let (file, preallocation) = if path.exists() {
        let file = opener.open(&path.to_string_lossy(), Some(Format::Raw), Access::Write).await?;
        if file.size() >= create.size {
            return Ok(file.close().await?);
        }
        (file, create.preallocated())
    } else {
        let file = opener.create_file(path)?;
        if !create.size.is_multiple_of(u64::from(file.limits().write_alignment)) {
            file.use_buffered()?;
        }
        let file: Rc<dyn Node> = file;
        (file, create.preallocated())
    };
    create::set_size(&*file, create.size, preallocation).await?;
    file.flush().await?;
    Ok(file.close().await?)
}

fn name(format: FormatArg) -> &'static str {
    headwater_image::probe::Format::from(format).as_str()
}

/// The size that was asked for, or that of the backing, which must be there in either case.
async fn size(args: &CreateArgs, opener: &Opener) -> Outcome<u64> {
    let backing = match &args.backing {
        None => None,
        Some(backing) => {
            let place = if crate::source::is_uri(backing) {
                backing.clone()
            } else {
                let directory = args.file.parent().unwrap_or(Path::new(""));
                directory.join(backing).to_string_lossy().into_owned()
            };
            let format = args.backing_format.map(Into::into);
            let node = opener.open(&place, format, Access::Read).await?;
            Some(node.size())
        }
    };
    args.size.or(backing).ok_or_else(|| {
        Failure::new(format!("{}: the size is missing; add it at the end (10G)", args.file.display()))
    })
}

/// Applies one `NAME=VALUE`.
fn apply(options: &mut CreateOptions, text: &str) -> Outcome {
    let (name, value) = text.split_once('=').unwrap_or((text, "on"));
    let refuse = |why: &str| Failure::new(format!("-o {text}: {why}"));
    let switch = || match value {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err(refuse("must be on or off")),
    };
    match name {
        "cluster_size" => options.cluster_size = parse_size(value).map_err(|why| refuse(&why))?,
        "compat" | "version" => {
            options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return Err(refuse("must be 0.10 or 1.1")),
            }
        }
        "refcount_bits" => {
            options.refcount_bits = value.parse().map_err(|_| refuse("must be a number of bits"))?;
        }
        "extended_l2" => options.extended_l2 = switch()?,
        "compression_type" => {
            options.compression = match value {
                "zlib" => Compression::Zlib,
                "zstd" => Compression::Zstd,
                _ => return Err(refuse("must be zlib or zstd")),
            }
        }
        "lazy_refcounts" => options.lazy_refcounts = switch()?,
        "preallocation" => {
            options.preallocation = Preallocation::from_name(value)
                .ok_or_else(|| refuse("must be off, metadata, falloc or full"))?;
        }
        "data_file" => options.data_file = Some(value.to_owned()),
        "data_file_raw" => options.data_file_raw = switch()?,
        _ => {
            return Err(refuse(
                "there is no such option; there are cluster_size, compat, refcount_bits, extended_l2, compression_type, lazy_refcounts, \
                 preallocation, data_file and data_file_raw",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_qemu_img_reads_them() {
        let mut options = CreateOptions::new(1);
        for text in [
            "cluster_size=2M",
            "compat=0.10",
            "refcount_bits=1",
            "extended_l2",
            "compression_type=zstd",
            "lazy_refcounts=on",
            "preallocation=falloc",
            "data_file=disk.raw",
            "data_file_raw=on",
        ] {
            apply(&mut options, text).unwrap();
        }
        assert_eq!((options.lazy_refcounts, options.preallocation), (true, Preallocation::Falloc));
        assert_eq!((options.data_file.as_deref(), options.data_file_raw), (Some("disk.raw"), true));
        assert_eq!(of_raw(["preallocation=full"].into_iter()).unwrap(), Preallocation::Full);
        assert!(of_raw(["cluster_size=4k"].into_iter()).is_err());
        assert_eq!((options.cluster_size, options.version, options.refcount_bits), (2 << 20, 2, 1));
        assert!(options.extended_l2 && options.compression == Compression::Zstd);
        for text in
            ["cluster_size=big", "compat=2", "extended_l2=maybe", "flavour=sweet", "preallocation=some"]
        {
            let failure = apply(&mut options, text).expect_err(text);
            assert!(failure.message.unwrap().contains(text));
        }
    }
}
