//! What a client of the HTTP face may send: the bytes go to a real one, over a connection of their own.
#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hotset::http::Http;
use hotset::{Config, Hotset};
use libfuzzer_sys::fuzz_target;

struct Face {
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
    _http: Http,
}

fn face() -> &'static Face {
    static FACE: OnceLock<Face> = OnceLock::new();
    FACE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let mut config = Config::default();
        config.catalog.watch = false;
        config.cuda.detect = false;
        config.http.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        let http = runtime.block_on(async {
            let hotset = Hotset::builder().config(config).start().await.expect("a system");
            Http::open(Arc::new(hotset)).await.expect("a free port").expect("HTTP")
        });
        Face { address: http.address(), _runtime: runtime, _http: http }
    })
}

fn exchange(address: SocketAddr, bytes: &[u8], whole: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).expect("the face listens");
    // Raw bytes that are no whole request, or that ask for events without end, are given up soon; a whole one is answered, however
    // busy the machine is.
    let patience = if whole { Duration::from_secs(9) } else { Duration::from_millis(50) };
    stream.set_read_timeout(Some(patience)).expect("a time");
    let _ = stream.write_all(bytes);
    if !whole {
        // Who does this while a load goes on has gone away, and is not answered.
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    let mut some = [0; 4096];
    while answer.len() <= 1 << 20 {
        match stream.read(&mut some) {
            Ok(read @ 1..) => answer.extend_from_slice(&some[..read]),
            // libFuzzer's own clock.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    answer
}

fuzz_target!(|bytes: &[u8]| {
    let address = face().address;
    // The first byte chooses: raw bytes, or a body (or a path) of a request that is well-formed.
    let Some((how, rest)) = bytes.split_first() else { return };
    let post = |path: &str| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            rest.len()
        );
        [head.as_bytes(), rest].concat()
    };
    let request = match how % 5 {
        0 => rest.to_vec(),
        1 => post("/v2/repository/index"),
        2 => post("/v2/repository/models/some/model/load"),
        3 => post("/v2/repository/models/some/model/unload"),
        _ => {
            let path: String = rest.iter().map(|byte| format!("%{byte:02x}")).collect();
            format!("GET /v2/models/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").into_bytes()
        }
    };
    let whole = how % 5 != 0;
    let answer = exchange(address, &request, whole);
    if whole {
        assert!(answer.starts_with(b"HTTP/1.1 "), "no answer to a whole request");
        // Nothing that a client sends is the server's fault.
        assert!(!answer.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&answer));
    }
});
