//! The node that has a data directory, as other commands find it and ask it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use base::failure::{Failure, Kind, io_failure};
use base::secret_file;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::data_dir::DataDir;

/// Where a node's API is, and the token that it wants.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Daemon {
    pub address: SocketAddr,
    pub token: String,
}

impl Daemon {
    /// A node whose API listens on `address`, and a token of whoever owns the data directory.
    pub fn at(address: SocketAddr, token: String) -> Self {
        Self { address: Self::reached_at(address), token }
    }

    /// Where it is reached from this machine: by loopback where it listens everywhere.
    pub fn reached_at(address: SocketAddr) -> SocketAddr {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        SocketAddr::new(ip, address.port())
    }

    /// Leaves word in the data directory; its owner alone may read it.
    pub fn announce(&self, dir: &DataDir) -> Result<(), Failure> {
        let path = dir.path().join("api.json");
        let _ = fs::remove_file(&path); // what a node that was killed has left
        let word = serde_json::to_vec(self).expect("an address and a token are JSON");
        secret_file::write(&path, &word).map_err(|error| io_failure("write", &path, &error))
    }

    /// Takes the word back.
    pub fn forget(dir: &DataDir) {
        let _ = fs::remove_file(dir.path().join("api.json"));
    }

    /// Where the node that has the data directory is to be asked, if it says.
    pub fn of(dir: &DataDir) -> Result<Option<Self>, Failure> {
        let path = dir.path().join("api.json");
        match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_failure("read", &path, &error)),
            Ok(bytes) => {
                let wrong = |error: serde_json::Error| Failure::new(Kind::Integrity, format!("{}: {error}", path.display()));
                serde_json::from_slice(&bytes).map(Some).map_err(wrong)
            }
        }
    }

    /// Asks for something.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        Self::read(self.ask(Method::GET, path, None).await?).await
    }

    /// Has something done.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        Self::read(self.ask(Method::POST, path, Some(body)).await?).await
    }

    async fn read(response: Response<Incoming>) -> Result<Value, Failure> {
        let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| Failure::new(Kind::Other, format!("the node that serves answers no JSON: {error}")))
    }

    /// Sends a request that is answered by a stream; `on_event` sees the data of each event.
    pub async fn stream(&self, path: &str, body: &Value, mut on_event: impl FnMut(Value) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut body = self.ask(Method::POST, path, Some(body)).await?.into_body();
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| broken(&error))?.into_data() else { continue };
            text.extend_from_slice(&data);
            while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = text.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event);
                match event.lines().find_map(|line| line.strip_prefix("data: ")) {
                    None => {}
                    Some("[DONE]") => return Ok(()),
                    Some(data) => on_event(parse(data)?)?,
                }
            }
        }
        Err(Failure::new(Kind::Other, "the node that serves has broken off its answer"))
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response<Incoming>, Failure> {
        let gone = |error: std::io::Error| {
            Failure::new(Kind::Busy, format!("the node that has the data directory does not answer at {}: {error}", self.address))
        };
        let stream = TcpStream::connect(self.address).await.map_err(gone)?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.address.to_string());
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = request.body(Full::new(body)).map_err(|error| Failure::new(Kind::Usage, error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
        let error: Value = serde_json::from_slice(&body).unwrap_or_default();
        Err(refusal(status, &error["error"]))
    }
}

fn broken(error: &hyper::Error) -> Failure {
    Failure::of(Kind::Other, error).about("the node that serves")
}

fn parse(data: &str) -> Result<Value, Failure> {
    let value: Value = serde_json::from_str(data).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    if value["error"].is_object() { Err(refusal(StatusCode::INTERNAL_SERVER_ERROR, &value["error"])) } else { Ok(value) }
}

/// The failure that an error of the API stands for.
fn refusal(status: StatusCode, error: &Value) -> Failure {
    let kind = match (status.as_u16(), error["code"].as_str()) {
        (_, Some("no_peers")) => Kind::NoPeers,
        (400..=402 | 405..=415, _) => Kind::Usage,
        (403, _) => Kind::Refused,
        (404, _) => Kind::NotFound,
        (429 | 503, _) => Kind::Busy,
        _ => Kind::Other,
    };
    Failure::new(kind, error["message"].as_str().map_or_else(|| format!("the node that serves answers {status}"), str::to_owned))
}
