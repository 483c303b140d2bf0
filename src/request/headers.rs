//! Request headers in arrival order. Lookups are linear: a request has some twenty of them.

use bytes::Bytes;

/// One header line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Name in lower case, pseudo headers included.
    pub name: String,
    /// Value bytes as received; not necessarily UTF-8.
    pub value: Bytes,
}

/// Header lines; repeated names stay separate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<Header>);

impl Headers {
    /// Appends a line, lower-casing its name.
    pub fn push(&mut self, mut name: String, value: Bytes) {
        name.make_ascii_lowercase();
        self.0.push(Header { name, value });
    }

    /// Value of the first line called `name` (lower case), as received.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.0.iter().find(|h| h.name == name).map(|h| &h.value)
    }

    /// Value of the first line called `name`, when it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// The first of `names` that is present decides, even with an empty value: a current name comes
    /// before its legacy aliases.
    pub fn first_present<'a>(&'a self, names: &[&str]) -> Option<&'a str> {
        names
            .iter()
            .find_map(|name| self.get(name))
            .map(|v| std::str::from_utf8(v).unwrap_or_default())
    }

    /// All lines in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Header> {
        self.0.iter()
    }
}

impl FromIterator<(String, Bytes)> for Headers {
    fn from_iter<I: IntoIterator<Item = (String, Bytes)>>(lines: I) -> Self {
        let mut headers = Self::default();
        for (name, value) in lines {
            headers.push(name, value);
        }
        headers
    }
}

impl<'a> IntoIterator for &'a Headers {
    type Item = &'a Header;
    type IntoIter = std::slice::Iter<'a, Header>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
