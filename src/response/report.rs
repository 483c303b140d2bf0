//! What engines write about usage, in the JSON of any of them.
//!
//! Read field by field rather than into fixed structs: engines write numbers as strings or `7.0`, the
//! names of two dialects beside each other, and other things under the same names.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::usage::Usage;

/// One report of usage, or an object that has some inside.
#[derive(Debug, Default)]
pub(super) struct Report {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    cached_tokens: Option<u64>,
    /// `cached_tokens` of the details, 0 where they have none.
    details: Option<u64>,
    /// `finish_reason` is there and not null.
    pub(super) finished: bool,
    pub(super) usage: Option<Box<Report>>,
    pub(super) message: Option<Box<Report>>,
    pub(super) response: Option<Box<Report>>,
    pub(super) meta_info: Option<Box<Report>>,
}

impl Report {
    /// A report without a total.
    pub(super) fn of_counts(prompt: u64, completion: u64, cached: Option<u64>) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            cached_tokens: cached,
            ..Self::default()
        }
    }

    /// Non-zero fields overwrite what earlier reports said.
    pub(super) fn merge_into(&self, usage: &mut Option<Usage>) {
        let all = usage.get_or_insert_with(Usage::default);
        if self.prompt_tokens > 0 {
            all.prompt_tokens = self.prompt_tokens;
        }
        if self.completion_tokens > 0 {
            all.completion_tokens = self.completion_tokens;
        }
        let both = self.prompt_tokens > 0 && self.completion_tokens > 0 && self.total_tokens > 0;
        all.total_tokens = if both {
            self.total_tokens
        } else {
            all.prompt_tokens.saturating_add(all.completion_tokens)
        };
        all.cached_tokens = self.details.or(self.cached_tokens).or(all.cached_tokens);
    }
}

#[derive(serde::Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Name {
    #[serde(alias = "input_tokens")]
    PromptTokens,
    #[serde(alias = "output_tokens")]
    CompletionTokens,
    TotalTokens,
    #[serde(alias = "input_tokens_details")]
    PromptTokensDetails,
    #[serde(alias = "cache_read_input_tokens")]
    CachedTokens,
    FinishReason,
    Usage,
    Message,
    Response,
    MetaInfo,
    #[serde(other)]
    Other,
}

impl<'de> Deserialize<'de> for Report {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ReportVisitor)
    }
}

struct ReportVisitor;

impl<'de> Visitor<'de> for ReportVisitor {
    type Value = Report;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Report, A::Error> {
        let mut report = Report::default();
        while let Some(name) = map.next_key()? {
            match name {
                Name::PromptTokens => set(&mut report.prompt_tokens, map.next_value()?),
                Name::CompletionTokens => set(&mut report.completion_tokens, map.next_value()?),
                Name::TotalTokens => set(&mut report.total_tokens, map.next_value()?),
                Name::CachedTokens => report.cached_tokens = map.next_value::<Count>()?.0,
                Name::PromptTokensDetails => {
                    let details = object(&mut map)?;
                    report.details = details.map(|d| d.cached_tokens.unwrap_or(0));
                }
                Name::FinishReason => {
                    report.finished = map.next_value::<Option<IgnoredAny>>()?.is_some();
                }
                Name::Usage => report.usage = object(&mut map)?,
                Name::Message => report.message = object(&mut map)?,
                Name::Response => report.response = object(&mut map)?,
                Name::MetaInfo => report.meta_info = object(&mut map)?,
                Name::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(report)
    }
}

/// Of two names for one number the one that counts something is meant.
fn set(field: &mut u64, Count(count): Count) {
    if let Some(count) = count.filter(|count| *count > 0) {
        *field = count;
    }
}

fn object<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Box<Report>>, A::Error> {
    Ok(map.next_value::<Object<Report>>()?.0.map(Box::new))
}

/// An object; anything else counts as absent.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) Option<T>);

/// A number, a numeric string, or nothing usable.
struct Count(Option<u64>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = deserializer.deserialize_any(Any(PhantomData))?;
        Ok(Self(match read {
            Read::Object(value) => Some(value),
            Read::Number(_) | Read::Nothing => None,
        }))
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = deserializer.deserialize_any(Any::<IgnoredAny>(PhantomData))?;
        Ok(Self(match read {
            Read::Number(number) => Some(number),
            Read::Object(_) | Read::Nothing => None,
        }))
    }
}

/// A value of any type.
enum Read<T> {
    Object(T),
    Number(u64),
    Nothing,
}

struct Any<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Any<T> {
    type Value = Read<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Read<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Read::Object)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Read<T>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Read::Nothing)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Read<T>, E> {
        Ok(Read::Number(number))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Read<T>, E> {
        Ok(Read::Nothing)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float cast saturates"
    )]
    fn visit_f64<E: Error>(self, number: f64) -> Result<Read<T>, E> {
        Ok(Read::Number(number as u64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Read<T>, E> {
        let number = text.trim().parse();
        Ok(number.map_or(Read::Nothing, Read::Number))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Read<T>, E> {
        Ok(Read::Nothing)
    }

    fn visit_unit<E: Error>(self) -> Result<Read<T>, E> {
        Ok(Read::Nothing)
    }
}
