//! Connections of the HTTP API: how many, how long they may take over a head or over taking what they asked for, and how they end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use base::failure::{Failure, Kind};
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_io_timeout::TimeoutStream;
use tracing::debug;

use super::connections::{Asking, ConnectionPlace, Connections};

/// Connections that may wait to be accepted. The system drops the next one, and its client tries again after a second.
const BACKLOG: u32 = 1024;
/// From the first byte of a head to its last; also how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that takes nothing for so long is hung up on.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Heads with more fields or bytes are refused.
const FIELDS_MAX: usize = 64;
const HEAD_BYTES_MAX: usize = 16 << 10;
/// How long connections may take to end once the node stops.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// A server at work.
pub struct Server {
    pub address: SocketAddr,
    stop: watch::Sender<bool>,
    ended: JoinHandle<()>,
}

impl Server {
    /// Binds `address`; requests are answered once there is a router.
    pub fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
        let failed = |error: std::io::Error| {
            let kind = if error.kind() == std::io::ErrorKind::AddrInUse { Kind::Busy } else { Kind::Other };
            Failure::new(kind, format!("cannot serve the API on {address}: {error}"))
        };
        listen(address).map_err(failed)
    }

    /// Answers requests until it is stopped.
    pub fn start(listener: TcpListener, router: Router) -> Result<Self, Failure> {
        let address = listener.local_addr().map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
        let (stop, stopped) = watch::channel(false);
        let ended = tokio::spawn(accept(listener, router, stopped));
        Ok(Self { address, stop, ended })
    }

    /// Takes no more requests, and ends when the last answer is out or has had its time.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.ended.await;
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    #[cfg(unix)]
    socket.set_reuseaddr(true)?; // or a node could not start again at once
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, router: Router, mut stopped: watch::Receiver<bool>) {
    let connections = Connections::default();
    let under_way = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => break,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Too many open files, mostly: others must end first.
                debug!(%error, "cannot accept a connection");
                connections.drop_idlest();
                tokio::time::sleep(HEAD_TIMEOUT / 1000).await;
                continue;
            }
        };
        let place = connections.take(address.ip());
        let connection =
            under_way.watch(serve(stream, Noting { inner: TowerToHyperService::new(router.clone()), place: Arc::clone(&place) }));
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    debug!(%error, "connection ended");
                },
                () = place.must_leave() => debug!("a connection that asked for nothing made room"),
            }
        });
    }
    let _ = tokio::time::timeout(END_PATIENCE, under_way.shutdown()).await;
}

/// Notes when a connection asks for something and when it has been answered.
struct Noting {
    inner: TowerToHyperService<Router>,
    place: Arc<ConnectionPlace>,
}

impl Service<Request<Incoming>> for Noting {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let asking = self.place.ask();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // It goes on asking until the last of the answer is taken.
            Ok(answer.map(|body| Body::new(Held { body, _asking: asking })))
        })
    }
}

/// A body, and something that lasts as long.
struct Held {
    body: Body,
    _asking: Asking,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

type Connection = http1::Connection<TokioIo<Pin<Box<TimeoutStream<TcpStream>>>>, Noting>;

fn serve(stream: TcpStream, service: Noting) -> Connection {
    let _ = stream.set_nodelay(true); // tokens are small, and somebody waits for each
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(FIELDS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}
