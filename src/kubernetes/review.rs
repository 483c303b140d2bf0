//! Who may read the metrics port: bearer tokens are shown to the API server (TokenReview), and what
//! they stand for is asked about (SubjectAccessReview).

use std::time::Duration;

use futures_util::future::BoxFuture;
use hashbrown::HashMap;
use http::{HeaderMap, Method, StatusCode, header};
use kube::Client;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::ask;
use crate::telemetry::server::{Gate, Refused};

const TOKEN_REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const ACCESS_REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
/// How long a token stands for the same user.
const TOKEN_TTL: Duration = Duration::from_mins(1);
/// How long a permission lasts.
const ALLOW_TTL: Duration = Duration::from_mins(5);
/// How long a refusal lasts.
const DENY_TTL: Duration = Duration::from_secs(30);
/// Answers kept of each kind. When there are more, those that ran out go, else all.
const MAX_CACHED: usize = 1024;
/// Longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 16 << 10;
/// Reviews under way at once; others wait, for a scraper with a bad token must not flood the server.
const MAX_REVIEWS: usize = 8;
/// How long both reviews of a request may take together.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the API server about requests, and remembers.
pub struct Reviewer {
    client: Client,
    tokens: Mutex<Cache<Option<Value>>>,
    permissions: Mutex<Cache<bool>>,
    reviews: Semaphore,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reviewer")
    }
}

/// Answers with an end.
#[derive(Debug)]
struct Cache<V>(HashMap<String, (V, Instant)>);

impl<V: Clone> Cache<V> {
    fn get(&self, key: &str) -> Option<V> {
        let (value, until) = self.0.get(key)?;
        (*until > Instant::now()).then(|| value.clone())
    }

    fn put(&mut self, key: String, value: V, ttl: Duration) {
        let now = Instant::now();
        if self.0.len() >= MAX_CACHED {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() >= MAX_CACHED {
            self.0.clear();
        }
        self.0.insert(key, (value, now + ttl));
    }
}

impl Reviewer {
    /// Nothing is known yet.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            tokens: Mutex::new(Cache(HashMap::new())),
            permissions: Mutex::new(Cache(HashMap::new())),
            reviews: Semaphore::new(MAX_REVIEWS),
        }
    }

    async fn decide(&self, token: &str, verb: &str, path: &str) -> Result<(), Refused> {
        let user = self.user(token).await?.ok_or(Refused::Unauthenticated)?;
        let name = user["username"].as_str().unwrap_or_default().to_owned();
        if self.may(&user, verb, path).await? {
            Ok(())
        } else {
            Err(Refused::Denied(name))
        }
    }

    /// Whose token it is; `None` for nobody's.
    async fn user(&self, token: &str) -> Result<Option<Value>, Refused> {
        if let Some(known) = self.tokens.lock().get(token) {
            return Ok(known);
        }
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token},
        });
        let status = self.review(TOKEN_REVIEWS, &review).await?;
        let genuine = status["authenticated"] == json!(true);
        let user = genuine.then(|| status["user"].clone());
        let ttl = if genuine { TOKEN_TTL } else { DENY_TTL };
        self.tokens.lock().put(token.to_owned(), user.clone(), ttl);
        Ok(user)
    }

    async fn may(&self, user: &Value, verb: &str, path: &str) -> Result<bool, Refused> {
        let spec = json!({
            "user": user["username"], "uid": user["uid"], "groups": user["groups"],
            "extra": user["extra"],
            "nonResourceAttributes": {"path": path, "verb": verb},
        });
        let key = spec.to_string();
        if let Some(known) = self.permissions.lock().get(&key) {
            return Ok(known);
        }
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": spec,
        });
        let status = self.review(ACCESS_REVIEWS, &review).await?;
        let allowed = status["allowed"] == json!(true);
        let ttl = if allowed { ALLOW_TTL } else { DENY_TTL };
        self.permissions.lock().put(key, allowed, ttl);
        Ok(allowed)
    }

    /// `status` of a review.
    async fn review(&self, path: &str, review: &Value) -> Result<Value, Refused> {
        let _permit = self.reviews.acquire().await.map_err(|_| Refused::Failed)?;
        let body = review.to_string().into_bytes();
        match ask(&self.client, "POST", path, body).await {
            Ok((StatusCode::OK | StatusCode::CREATED, mut answer)) => Ok(answer["status"].take()),
            Ok((status, answer)) => {
                let problem = answer["message"].as_str().unwrap_or_default();
                tracing::warn!(path, %status, problem, "a review was refused");
                Err(Refused::Failed)
            }
            Err(problem) => {
                tracing::warn!(path, problem, "a review failed");
                Err(Refused::Failed)
            }
        }
    }
}

impl Gate for Reviewer {
    fn check<'a>(
        &'a self,
        method: &'a Method,
        path: &'a str,
        headers: &'a HeaderMap,
    ) -> BoxFuture<'a, Result<(), Refused>> {
        Box::pin(async move {
            let value = headers.get(header::AUTHORIZATION);
            let value = value.and_then(|value| value.to_str().ok());
            let (scheme, token) = value
                .and_then(|value| value.split_once(' '))
                .ok_or(Refused::Unauthenticated)?;
            let token = token.trim();
            let usable = !token.is_empty() && token.len() <= MAX_TOKEN_BYTES;
            if !scheme.eq_ignore_ascii_case("bearer") || !usable {
                return Err(Refused::Unauthenticated);
            }
            let verb = method.as_str().to_ascii_lowercase();
            let decided = timeout(REVIEW_TIMEOUT, self.decide(token, &verb, path));
            decided.await.unwrap_or(Err(Refused::Failed))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::ApiServer;

    const TOKENS: &str = "authentication.k8s.io/v1/tokenreviews";
    const ACCESS: &str = "authorization.k8s.io/v1/subjectaccessreviews";

    async fn reviewer() -> (ApiServer, Reviewer) {
        let server = ApiServer::start().await;
        server.review(TOKENS, |review| {
            let token = review["spec"]["token"].as_str().unwrap();
            match token.strip_prefix("good-") {
                Some(user) => json!({"status": {"authenticated": true, "user": {"username": user, "groups": ["g"]}}}),
                None => json!({"status": {"authenticated": false, "error": "no such token"}}),
            }
        });
        server.review(ACCESS, |review| {
            let spec = &review["spec"];
            assert_eq!(spec["groups"], json!(["g"]));
            let attributes = json!({"path": "/metrics", "verb": "get"});
            let allowed = spec["user"] == "scraper" && spec["nonResourceAttributes"] == attributes;
            json!({"status": {"allowed": allowed}})
        });
        let reviewer = Reviewer::new(server.client());
        (server, reviewer)
    }

    async fn ask(reviewer: &Reviewer, authorization: &str, path: &str) -> Result<(), Refused> {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        reviewer.check(&Method::GET, path, &headers).await
    }

    #[tokio::test]
    async fn a_token_needs_a_user_and_the_user_a_permission() {
        let (server, reviewer) = reviewer().await;
        assert_eq!(
            ask(&reviewer, "Bearer good-scraper", "/metrics").await,
            Ok(())
        );
        let denied = |user: &str| Err(Refused::Denied(user.to_owned()));
        assert_eq!(
            ask(&reviewer, "Bearer good-visitor", "/metrics").await,
            denied("visitor")
        );
        assert_eq!(
            ask(&reviewer, "bearer good-scraper", "/debug/plugins/state").await,
            denied("scraper")
        );
        for nobody in ["", "Bearer", "Bearer ", "Basic good-scraper", "Bearer bad"] {
            assert_eq!(
                ask(&reviewer, nobody, "/metrics").await,
                Err(Refused::Unauthenticated),
                "{nobody:?}"
            );
        }
        let long = format!("Bearer good-{}", "x".repeat(MAX_TOKEN_BYTES));
        assert_eq!(
            ask(&reviewer, &long, "/metrics").await,
            Err(Refused::Unauthenticated)
        );
        server.refuse(TOKENS, 403);
        assert_eq!(
            ask(&reviewer, "Bearer good-new", "/metrics").await,
            Err(Refused::Failed)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_remembered_for_a_while() {
        let (server, reviewer) = reviewer().await;
        let count = |resource: &str| {
            let requests = server.requests();
            requests.iter().filter(|r| r.contains(resource)).count()
        };
        for (wait, reviews) in [(0, (1, 1)), (59, (1, 1)), (2, (2, 1)), (300, (3, 2))] {
            tokio::time::advance(Duration::from_secs(wait)).await;
            assert_eq!(
                ask(&reviewer, "Bearer good-scraper", "/metrics").await,
                Ok(())
            );
            assert_eq!(
                (count("tokenreviews"), count("subjectaccessreviews")),
                reviews,
                "{wait}"
            );
        }
        // Refusals for half a minute.
        for (wait, reviews) in [(0, 3), (29, 3), (2, 4)] {
            tokio::time::advance(Duration::from_secs(wait)).await;
            assert!(
                ask(&reviewer, "Bearer good-visitor", "/metrics")
                    .await
                    .is_err()
            );
            assert_eq!(count("subjectaccessreviews"), reviews, "{wait}");
        }
    }

    #[test]
    fn the_cache_has_a_limit() {
        let mut cache = Cache(HashMap::new());
        for n in 0..MAX_CACHED {
            cache.put(n.to_string(), n, TOKEN_TTL);
        }
        assert_eq!((cache.0.len(), cache.get("0")), (MAX_CACHED, Some(0)));
        cache.put("one more".to_owned(), 1, TOKEN_TTL);
        assert_eq!(
            (cache.0.len(), cache.get("0"), cache.get("one more")),
            (1, None, Some(1))
        );
    }
}
