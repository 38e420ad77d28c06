//! A TCP connection to a host that has several addresses, of which some may lead nowhere.
//!
//! They are tried in turns of their families, each some time after the one before or as soon as that fails, and the first that answers counts. One after the other,
//! a single address that swallows what is sent to it would take all the time that connecting may take: many hosts have one of IPv6, and many networks no
//! way there.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long an address has for itself before the next one is tried beside it: what RFC 8305 recommends.
const HEAD_START: Duration = Duration::from_millis(250);

/// Connects to whichever of `addresses`, which are in the order of preference, answers first.
///
/// # Errors
/// The last one, if none answers; and `NotFound` if there is no address at all. It may take as long as the system has patience with the slowest.
pub(crate) async fn dial(addresses: impl IntoIterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut left = in_turns(addresses.into_iter().collect()).into_iter();
    let mut dialling = FuturesUnordered::new();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    loop {
        match left.next() {
            Some(address) => dialling.push(TcpStream::connect(address)),
            None if dialling.is_empty() => return Err(failed),
            None => {}
        }
        let others = if left.len() == 0 { Duration::MAX } else { HEAD_START };
        match tokio::time::timeout(others, dialling.next()).await {
            Ok(Some(Ok(stream))) => return Ok(stream),
            Ok(Some(Err(err))) => failed = err,
            Ok(None) | Err(_) => {}
        }
    }
}

/// The families in turns, that of the first address first.
fn in_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let family = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == family);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut turns = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair == [None, None] {
            return turns;
        }
        turns.extend(pair.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use tokio::net::TcpSocket;
    use tokio::time::Instant;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    /// A port whose listener takes no more: whoever connects waits.
    async fn full() -> (SocketAddr, Vec<TcpStream>, tokio::net::TcpListener) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(HEAD_START, TcpStream::connect(address)).await {
            queue.push(stream);
        }
        (address, queue, listener)
    }

    #[test]
    fn an_address_that_leads_nowhere_costs_its_head_start() {
        run(async {
            let (nowhere, _queue, _listener) = full().await;
            let good = TcpListener::bind("127.0.0.1:0").unwrap();
            let start = Instant::now();
            let stream = dial([nowhere, nowhere, good.local_addr().unwrap()]).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), good.local_addr().unwrap());
            assert!(
                start.elapsed() >= 2 * HEAD_START && start.elapsed() < 8 * HEAD_START,
                "{:?}",
                start.elapsed()
            );
        });
    }

    #[test]
    fn refusals_cost_nothing_and_the_last_one_is_told() {
        run(async {
            let closed = TcpListener::bind("127.0.0.1:0").unwrap();
            let refuses = closed.local_addr().unwrap();
            drop(closed);
            let good = TcpListener::bind("127.0.0.1:0").unwrap();
            let start = Instant::now();
            dial([refuses, refuses, good.local_addr().unwrap()]).await.unwrap();
            assert!(start.elapsed() < HEAD_START, "{:?}", start.elapsed());
            let error = dial([refuses, refuses]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(dial([]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn families_take_turns() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let [a, b, c] = ["[::1]:1", "[::2]:1", "[::3]:1"].map(address);
        let [x, y] = ["127.0.0.1:1", "127.0.0.2:1"].map(address);
        assert_eq!(in_turns(vec![a, b, c, x]), [a, x, b, c]);
        assert_eq!(in_turns(vec![x, a, y]), [x, a, y]);
        assert_eq!(in_turns(vec![x, y]), [x, y]);
    }
}
