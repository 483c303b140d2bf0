//! Whether a chat template wants message content as a string or as a list of parts.
//!
//! vLLM (`vllm/renderers/hf.py`) looks for a loop over the content of a message: a `for` whose
//! iterable is `content` of a variable that itself loops over `messages`, or over a variable assigned
//! from them. Filters, tests and slices behind a variable do not change what it is.

/// How content reaches the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentFormat {
    /// One string; text parts joined by line feeds.
    String,
    /// A list of `{"type": "text", "text": ..}`.
    Parts,
}

/// `for target in iterable` or `set target = iterable`.
#[derive(Debug, PartialEq, Eq)]
struct Binding<'a> {
    target: &'a str,
    source: Vec<Token<'a>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Name(&'a str),
    Text(&'a str),
    Other(char),
}

/// The format `template` wants.
pub fn detect(template: &str) -> ContentFormat {
    match detect_parts(template) {
        Some(true) => ContentFormat::Parts,
        // A target other than a name makes vLLM give up with its default, which is a string.
        Some(false) | None => ContentFormat::String,
    }
}

fn detect_parts(template: &str) -> Option<bool> {
    let (loops, assignments) = bindings(template);
    let mut conversations = vec!["messages"];
    let mut next = 0;
    while let Some(&name) = conversations.get(next) {
        for assigned in assignments.iter().filter(|b| refers(&b.source, name, None)) {
            let target = plain(assigned.target)?;
            if !conversations.contains(&target) {
                conversations.push(target);
            }
        }
        next += 1;
    }
    let mut messages = Vec::new();
    for one in &loops {
        if conversations
            .iter()
            .any(|name| refers(&one.source, name, None))
        {
            messages.push(plain(one.target)?);
        }
    }
    for one in &loops {
        if messages
            .iter()
            .any(|name| refers(&one.source, name, Some("content")))
        {
            return plain(one.target).map(|_| true);
        }
    }
    Some(false)
}

fn plain(target: &str) -> Option<&str> {
    let name = |c: char| c.is_alphanumeric() || c == '_';
    target.chars().all(name).then_some(target)
}

/// Every `for` and every `set` with a value, in order.
fn bindings(template: &str) -> (Vec<Binding<'_>>, Vec<Binding<'_>>) {
    let (mut loops, mut assignments) = (Vec::new(), Vec::new());
    let mut rest = template;
    while let Some(start) = rest.find("{%").map(|at| at + 2) {
        let Some(end) = rest.get(start..).and_then(|tail| tail.find("%}")) else {
            break;
        };
        let tag = rest.get(start..start + end).unwrap_or_default();
        rest = rest.get(start + end + 2..).unwrap_or_default();
        let tag = tag.trim_matches(['-', '+']).trim();
        if let Some((target, source)) = tag.strip_prefix("for ").and_then(|t| t.split_once(" in "))
        {
            loops.push(binding(target, source));
        } else if let Some((target, source)) =
            tag.strip_prefix("set ").and_then(|t| t.split_once('='))
        {
            assignments.push(binding(target, source));
        }
    }
    (loops, assignments)
}

fn binding<'a>(target: &'a str, source: &'a str) -> Binding<'a> {
    let mut tokens = tokens(source);
    // The condition and the flag of a `for` are not part of its iterable.
    let end = tokens
        .iter()
        .position(|t| matches!(t, Token::Name("if" | "recursive")));
    let conditional = tokens.contains(&Token::Name("else"));
    if let (Some(end), false) = (end, conditional) {
        tokens.truncate(end);
    }
    Binding {
        target: target.trim(),
        source: tokens,
    }
}

fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut out = Vec::new();
    let mut rest = source.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' | '"' => {
                let inner = rest.get(1..).unwrap_or_default();
                let end = inner.find(first).unwrap_or(inner.len());
                out.push(Token::Text(inner.get(..end).unwrap_or_default()));
                (end + 2).min(rest.len())
            }
            c if c.is_alphanumeric() || c == '_' => {
                let end = rest
                    .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                    .unwrap_or(rest.len());
                out.push(Token::Name(rest.get(..end).unwrap_or_default()));
                end
            }
            c => {
                out.push(Token::Other(c));
                c.len_utf8()
            }
        };
        rest = rest.get(length..).unwrap_or_default().trim_start();
    }
    out
}

/// True when `source` is the variable `name` (or its `key`), with slices, filters and tests behind.
fn refers(source: &[Token<'_>], name: &str, key: Option<&str>) -> bool {
    let mut source = source;
    while let [Token::Other('('), inner @ .., Token::Other(')')] = source {
        if !balanced(inner) {
            break;
        }
        source = inner;
    }
    let [Token::Name(first), rest @ ..] = source else {
        return false;
    };
    if *first != name {
        return false;
    }
    let rest = match (key, rest) {
        (None, rest) => rest,
        (Some(key), [Token::Other('.'), Token::Name(attribute), rest @ ..])
            if *attribute == key =>
        {
            rest
        }
        (
            Some(key),
            [
                Token::Other('['),
                Token::Text(item),
                Token::Other(']'),
                rest @ ..,
            ],
        ) if *item == key => rest,
        _ => return false,
    };
    is_transparent(rest)
}

/// True for nothing but slices, filters and tests.
fn is_transparent(tokens: &[Token<'_>]) -> bool {
    match tokens {
        [] => true,
        [Token::Other('['), rest @ ..] => {
            let Some(end) = closing(rest, ']') else {
                return false;
            };
            let (index, behind) = rest.split_at(end);
            index.contains(&Token::Other(':'))
                && is_transparent(behind.get(1..).unwrap_or_default())
        }
        [Token::Other('|'), Token::Name(_), rest @ ..] => behind_call(rest),
        [Token::Name("is"), rest @ ..] => {
            let test = rest.strip_prefix(&[Token::Name("not")]).unwrap_or(rest);
            matches!(test, [Token::Name(_), ..]) && behind_call(test.get(1..).unwrap_or_default())
        }
        _ => false,
    }
}

/// As [`is_transparent`], behind the arguments of a filter or test if it has any.
fn behind_call(tokens: &[Token<'_>]) -> bool {
    match tokens {
        [Token::Other('('), inner @ ..] => closing(inner, ')')
            .is_some_and(|end| is_transparent(inner.get(end + 1..).unwrap_or_default())),
        tokens => is_transparent(tokens),
    }
}

fn balanced(tokens: &[Token<'_>]) -> bool {
    closing(tokens, ')').is_none()
}

/// Where the bracket that was opened before `tokens` closes.
fn closing(tokens: &[Token<'_>], close: char) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Other('(' | '[' | '{') => depth += 1,
            Token::Other(c @ (')' | ']' | '}')) => {
                if depth == 0 {
                    return (*c == close).then_some(at);
                }
                depth -= 1;
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: vLLM's `_detect_content_format` on the same templates, worked out by its rules.
    fn is_parts(template: &str) -> bool {
        detect(template) == ContentFormat::Parts
    }

    #[test]
    fn a_loop_over_the_content_of_a_message_wants_parts() {
        assert!(is_parts(
            "{%- for message in messages %}{%- for part in message['content'] %}x{% endfor %}{% endfor %}"
        ));
        assert!(is_parts(
            "{% for m in messages[1:] if m.role %}{% for c in m.content | list %}{% endfor %}{% endfor %}"
        ));
        assert!(is_parts(
            "{% set loop_messages = messages %}{% for m in loop_messages %}{% for c in m.content %}{% endfor %}{% endfor %}"
        ));
    }

    #[test]
    fn anything_else_wants_a_string() {
        assert!(!is_parts(
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        ));
        assert!(!is_parts(
            "{% for m in messages %}{% for t in m.tool_calls %}{% endfor %}{% endfor %}"
        ));
        // An element, not the list.
        assert!(!is_parts(
            "{% set m = messages[0] %}{% for c in m.content %}{% endfor %}"
        ));
        // A conditional expression is no variable.
        assert!(!is_parts(
            "{% for m in (messages[1:] if x else messages) %}{% for c in m.content %}{% endfor %}{% endfor %}"
        ));
        assert!(!is_parts(
            "{% for m, n in messages %}{% for c in m.content %}{% endfor %}{% endfor %}"
        ));
    }
}
