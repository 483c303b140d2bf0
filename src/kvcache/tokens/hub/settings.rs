//! Where the hub and its cache are, by the environment variables its own library reads.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The public hub.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long connecting, an answer's head and each further piece of it may take.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Who we are to the hub.
#[derive(Clone, Default)]
pub struct Token {
    /// Given directly.
    pub value: Option<String>,
    /// Else read from here, whenever the hub is asked.
    pub file: Option<PathBuf>,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("given", &self.value.is_some())
            .field("file", &self.file)
            .finish()
    }
}

impl Token {
    /// The token as it is now; `None` when there is none.
    pub(super) fn read(&self) -> Option<String> {
        let text = match (&self.value, &self.file) {
            (Some(value), _) => value.clone(),
            (None, Some(file)) => std::fs::read_to_string(file).ok()?,
            (None, None) => return None,
        };
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }
}

/// What a hub's client needs to know.
#[derive(Clone)]
pub struct HubSettings {
    /// URL of the hub or of a mirror, without a slash at the end.
    pub endpoint: String,
    /// Directory with a folder for each model.
    pub cache: PathBuf,
    /// Sent to the endpoint, and to no other host.
    pub token: Token,
    /// Ask nobody: the cache has to do.
    pub offline: bool,
    /// For connecting, for the head of an answer and for each further piece of it.
    pub timeout: Duration,
    /// URL of a proxy for https and, with commas, the hosts that are reached without it.
    pub proxy: Option<(String, String)>,
}

impl std::fmt::Debug for HubSettings {
    /// Without the proxy's URL, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token)
            .field("offline", &self.offline)
            .field("timeout", &self.timeout)
            .field("proxy", &self.proxy.is_some())
            .finish()
    }
}

impl HubSettings {
    /// As the process's environment says: `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT` and their older names; `HTTPS_PROXY`
    /// and `NO_PROXY` in either case.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`Self::from_env`], by variables from elsewhere. An empty variable counts as none.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let first = |names: &[&str]| {
            let mut set = names.iter().filter_map(|name| variable(name));
            set.find(|value| !value.trim().is_empty())
        };
        let user = first(&["HOME"]).map_or_else(|| PathBuf::from("/"), PathBuf::from);
        let path = |text: String| match text.strip_prefix("~/") {
            Some(rest) => user.join(rest),
            None => PathBuf::from(text),
        };
        let of_user = || {
            let cache = first(&["XDG_CACHE_HOME"]).map(path);
            let cache = cache.unwrap_or_else(|| user.join(".cache"));
            cache.join("huggingface")
        };
        let home = first(&["HF_HOME"]).map_or_else(of_user, path);
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(path);
        let token_file = first(&["HF_TOKEN_PATH"]).map(path);
        let endpoint = first(&["HF_ENDPOINT"]).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let seconds = first(&["HF_HUB_DOWNLOAD_TIMEOUT"]).and_then(|text| text.parse().ok());
        let implicit = !first(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]).is_some_and(|v| is_on(&v));
        Self {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            cache: cache.unwrap_or_else(|| home.join("hub")),
            token: if implicit {
                Token {
                    value: first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]),
                    file: Some(token_file.unwrap_or_else(|| home.join("token"))),
                }
            } else {
                Token::default()
            },
            offline: first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]).is_some_and(|v| is_on(&v)),
            proxy: first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]).map(|url| {
                let except = first(&["NO_PROXY", "no_proxy"]);
                (url.trim().to_owned(), except.unwrap_or_default())
            }),
            timeout: seconds
                .filter(|seconds| *seconds > 0)
                .map_or(DEFAULT_TIMEOUT, Duration::from_secs),
        }
    }

    /// The same with another cache.
    #[must_use]
    pub fn with_cache(mut self, cache: &Path) -> Self {
        cache.clone_into(&mut self.cache);
        self
    }
}

/// The words the hub's library takes for true.
fn is_on(value: &str) -> bool {
    let value = value.trim().to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> HubSettings {
        HubSettings::from_variables(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_variables_it_is_the_public_hub_and_the_users_cache() {
        let plain = settings(&[("HOME", "/home/u"), ("HF_TOKEN", "")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(
            plain.cache,
            Path::new("/home/u/.cache/huggingface/hub"),
            "the library's default"
        );
        assert_eq!(plain.token.value, None);
        let file = plain.token.file.unwrap();
        assert_eq!(file, Path::new("/home/u/.cache/huggingface/token"));
        assert!(!plain.offline);
        assert_eq!(plain.proxy, None);
        assert_eq!(plain.timeout, Duration::from_secs(10));
    }

    #[test]
    fn variables_are_those_of_the_hubs_library() {
        let given = settings(&[
            ("HOME", "/home/u"),
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_HOME", "~/hf"),
            ("HF_TOKEN", " hf_x\n"),
            ("HF_HUB_OFFLINE", "yes"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "3"),
            ("https_proxy", "http://u:secret@proxy:3128"),
            ("NO_PROXY", "localhost"),
        ]);
        let proxy = (
            "http://u:secret@proxy:3128".to_owned(),
            "localhost".to_owned(),
        );
        assert_eq!(given.proxy, Some(proxy));
        assert_eq!(given.endpoint, "http://mirror:8080");
        assert_eq!(given.cache, Path::new("/home/u/hf/hub"));
        assert_eq!(given.token.read().unwrap(), "hf_x");
        assert!(given.offline);
        assert_eq!(given.timeout, Duration::from_secs(3));
        let debug = format!("{given:?}");
        assert!(
            !debug.contains("hf_x") && !debug.contains("secret"),
            "{debug}"
        );
        let cache = settings(&[("HF_HUB_CACHE", "/models"), ("HF_HOME", "/hf")]).cache;
        assert_eq!(cache, Path::new("/models"));
        let older = settings(&[
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("XDG_CACHE_HOME", "/x"),
            ("TRANSFORMERS_OFFLINE", "1"),
        ]);
        assert_eq!(older.cache, Path::new("/old"));
        assert_eq!(older.token.file.unwrap(), Path::new("/x/huggingface/token"));
        assert!(older.offline);
    }

    #[test]
    fn a_token_may_be_in_a_file_and_may_be_forbidden() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        let variables = [("HF_TOKEN_PATH", file.to_str().unwrap())];
        let token = settings(&variables).token;
        assert_eq!(token.read(), None);
        std::fs::write(&file, "hf_file\n").unwrap();
        assert_eq!(token.read().unwrap(), "hf_file");
        let none = settings(&[("HF_TOKEN", "hf_x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]);
        assert_eq!(none.token.read(), None);
    }
}
