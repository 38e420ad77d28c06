//! What the tests of the file modules share.

use std::future::Future;

/// Runs a future on a tokio runtime of one thread.
pub(super) fn on_runtime<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// An empty file that vanishes.
pub(super) fn scratch_file() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

/// The path of one of QEMU's tools, if it is installed. With HEADWATER_REQUIRE_TOOLS set, a missing tool fails the test.
pub(super) fn qemu_tool(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|tool| tool.is_file());
    assert!(
        found.is_some() || std::env::var_os("HEADWATER_REQUIRE_TOOLS").is_none(),
        "{name} is not installed"
    );
    found
}
