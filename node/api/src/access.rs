//! Who may ask: tokens, the names under which this API answers, and pages of other origins.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::Response;

use super::body::refuse_unread;
use super::error::ApiError;

/// The rules of one API.
#[derive(Clone, Debug)]
pub struct Access {
    /// Hashes of the tokens; nothing where none is needed.
    tokens: Option<Arc<Vec<blake3::Hash>>>,
    /// Of the token that whoever owns the data directory has: what changes trust or fills the disk needs it, or one of the others, everywhere.
    owner: blake3::Hash,
    /// Names under which this API answers, besides addresses and `localhost`.
    names: Arc<BTreeSet<String>>,
}

/// Who asks, for turns in the queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Asker {
    /// Anybody on this machine.
    Local,
    /// Who has the token of this number.
    Token(usize),
}

impl Access {
    /// Without tokens, everybody who reaches it may ask, but not change anything.
    pub fn new(tokens: Option<&[String]>, owner: &str, names: impl IntoIterator<Item = String>) -> Self {
        let hash = |tokens: &[String]| tokens.iter().map(|token| blake3::hash(token.as_bytes())).collect();
        Self {
            tokens: tokens.map(|tokens| Arc::new(hash(tokens))),
            owner: blake3::hash(owner.as_bytes()),
            names: Arc::new(names.into_iter().map(|name| name.to_ascii_lowercase()).collect()),
        }
    }

    /// Whether tokens are needed at `address` unless the user says otherwise.
    pub fn needs_tokens(address: SocketAddr) -> bool {
        !address.ip().is_loopback()
    }

    fn check(&self, headers: &HeaderMap, uri: &Uri) -> Result<Asker, ApiError> {
        // It tells nothing, and who checks whether a node is there often knows it by another name, or by none.
        if uri.path() == "/health" {
            return Ok(Asker::Local);
        }
        let host = self.check_host(headers, uri)?;
        check_origin(headers, &host)?;
        let tokens = match &self.tokens {
            Some(tokens) if !is_open(uri.path()) => &tokens[..],
            None if changes_the_node(uri.path()) => &[],
            _ => return Ok(Asker::Local),
        };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let Some((_, token)) = token else {
            let of_owner = if self.tokens.is_none() { " (the one in api.json in the node's data directory)" } else { "" };
            return Err(ApiError::unauthorized(format!("this needs a token: Authorization: Bearer TOKEN{of_owner}")));
        };
        let given = blake3::hash(token.trim().as_bytes()); // hashes compare in the same time wherever they differ
        let number = tokens.iter().chain([&self.owner]).position(|token| *token == given);
        number.map(Asker::Token).ok_or_else(|| ApiError::unauthorized("the token is not one of this node's"))
    }

    /// Refuses requests under a name that is not ours: a web page may have had its own name resolved to this machine (DNS rebinding).
    fn check_host(&self, headers: &HeaderMap, uri: &Uri) -> Result<String, ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = match (hosts.next(), hosts.next(), uri.authority()) {
            (Some(host), None, None) => host.to_str().unwrap_or_default().to_ascii_lowercase(),
            (_, None, Some(authority)) => authority.as_str().to_ascii_lowercase(),
            _ => String::new(),
        };
        let name = host_name(&host);
        if name == "localhost" || name.parse::<IpAddr>().is_ok() || self.names.contains(name) {
            return Ok(host);
        }
        Err(ApiError::forbidden("forbidden_host", format!("{name:?} is no name of this node (--api-name NAME makes it one)")))
    }
}

/// The name in a `Host` field, without port or brackets.
fn host_name(host: &str) -> &str {
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit())).map_or(host, |(name, _)| name);
    name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name)
}

/// Refuses what pages of other origins send.
fn check_origin(headers: &HeaderMap, host: &str) -> Result<(), ApiError> {
    let own = |origin: &str| origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")).is_some_and(|name| name == host);
    let mut origins = headers.get_all(header::ORIGIN).iter();
    match origins.find(|origin| !origin.to_str().is_ok_and(|origin| own(&origin.to_ascii_lowercase()))) {
        None => Ok(()),
        Some(_) => Err(ApiError::forbidden("forbidden_origin", "pages of other origins may not use this API")),
    }
}

/// What has nothing to tell: whether the node is there, and the page that asks for the token.
fn is_open(path: &str) -> bool {
    path == "/" || path == "/health" || path.starts_with("/dashboard/")
}

/// What changes whom the node trusts, or fills its disk: other users of this machine may not.
fn changes_the_node(path: &str) -> bool {
    ["/api/join", "/api/pull", "/api/unload"].contains(&path)
}

/// Lets a request pass, or refuses it.
pub(crate) async fn check(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    match access.check(request.headers(), request.uri()) {
        Ok(asker) => {
            request.extensions_mut().insert(asker);
            next.run(request).await
        }
        Err(error) => refuse_unread(error, request).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(access: &Access, path: &str, fields: &[(&'static str, &str)]) -> Result<Asker, ApiError> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, value.parse().expect("a value"));
        }
        access.check(&headers, &path.parse().expect("a path"))
    }

    #[test]
    fn answers_by_address_and_by_its_own_names_alone() {
        let access = Access::new(None, "owner", ["Box.lan".to_owned()]);
        for host in ["127.0.0.1:4748", "[::1]:4748", "localhost", "LOCALHOST:1", "192.168.1.7", "box.lan:4748"] {
            assert_eq!(ask(&access, "/", &[("host", host)]), Ok(Asker::Local), "{host}");
        }
        for host in ["evil.example", "evil.example:4748", "", "localhost.evil.example", "127.0.0.1.evil.example", "box.lan.", "[localhost"]
        {
            assert_eq!(ask(&access, "/v1/models", &[("host", host)]).expect_err(host).status, 403, "{host}");
            assert_eq!(ask(&access, "/health", &[("host", host)]), Ok(Asker::Local), "{host}");
        }
        assert!(ask(&access, "/", &[]).is_err() && ask(&access, "/health", &[]).is_ok());
        assert!(ask(&access, "/", &[("host", "localhost"), ("host", "evil.example")]).is_err());
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        let access = Access::new(None, "owner", []);
        let host = ("host", "127.0.0.1:4748");
        assert!(ask(&access, "/", &[host, ("origin", "http://127.0.0.1:4748")]).is_ok());
        for origin in ["null", "http://evil.example", "http://127.0.0.1:80", "http://localhost:4748", "file://", ""] {
            assert_eq!(ask(&access, "/", &[host, ("origin", origin)]).expect_err(origin).status, 403, "{origin}");
        }
    }

    #[test]
    fn what_changes_the_node_needs_the_owner_s_token_even_where_no_other_is_needed() {
        let access = Access::new(None, "owner", []);
        let host = ("host", "127.0.0.1");
        for path in ["/api/join", "/api/pull", "/api/unload"] {
            assert_eq!(ask(&access, path, &[host]).expect_err(path).status, 401);
            assert_eq!(ask(&access, path, &[host, ("authorization", "Bearer other")]).expect_err(path).status, 401);
            assert!(ask(&access, path, &[host, ("authorization", "Bearer owner")]).is_ok());
        }
        assert!(ask(&access, "/v1/models", &[host]).is_ok());
    }

    #[test]
    fn tokens_are_needed_where_there_are_any() {
        let access = Access::new(Some(&["one".to_owned(), "two".to_owned()]), "one", []);
        let host = ("host", "127.0.0.1");
        assert_eq!(ask(&access, "/v1/models", &[host, ("authorization", "Bearer two")]), Ok(Asker::Token(1)));
        assert_eq!(ask(&access, "/health", &[host]), Ok(Asker::Local));
        for wrong in ["Bearer three", "Bearer", "Basic one", "one", "Bearer onetwo", "Bearer "] {
            assert_eq!(ask(&access, "/v1/models", &[host, ("authorization", wrong)]).expect_err(wrong).status, 401, "{wrong}");
        }
        assert_eq!(ask(&access, "/api/node", &[host]).expect_err("no token").status, 401);
    }
}
