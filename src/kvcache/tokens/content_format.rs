//! Whether a chat template wants message content as a string or as a list of parts.
//!
//! vLLM (`vllm/renderers/hf.py`, 0.32) looks for a loop over the content of a message, which is a
//! `for` whose iterable is
//!
//! * `content` of a variable that itself loops over `messages`, or over a variable assigned from them;
//! * or, inside a macro, a parameter that some call gives such a content;
//! * or, outside macros, a variable that is called `content`.
//!
//! Filters, tests and slices behind a variable do not change what it is, save in the last two.

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
    /// Where the statement begins.
    at: usize,
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
    let outline = Outline::read(template);
    let mut conversations = vec!["messages"];
    let mut next = 0;
    while let Some(&name) = conversations.get(next) {
        let assigned = outline.assignments.iter();
        for assigned in assigned.filter(|b| refers(&b.source, name, None)) {
            let target = plain(assigned.target)?;
            if !conversations.contains(&target) {
                conversations.push(target);
            }
        }
        next += 1;
    }
    let mut messages = Vec::new();
    for one in &outline.loops {
        let mut names = conversations.iter();
        if names.any(|name| refers(&one.source, name, None)) {
            messages.push(plain(one.target)?);
        }
    }
    let is_content = |source: &[Token<'_>]| {
        let mut names = messages.iter();
        names.any(|name| refers(source, name, Some("content")))
    };
    let given: Vec<Vec<&str>> = outline
        .macros
        .iter()
        .map(|one| one.given(&outline.calls, &is_content))
        .collect();
    for one in &outline.loops {
        let around = outline.macros.iter().zip(&given);
        let around: Vec<_> = around.filter(|(m, _)| m.range.contains(&one.at)).collect();
        // A macro inside another has the word if it was given anything.
        let parameters = around.iter().rev().find(|(_, given)| !given.is_empty());
        let by_name = match without_brackets(&one.source) {
            [Token::Name(name)] if around.is_empty() => *name == "content",
            [Token::Name(name)] => parameters.is_some_and(|(_, given)| given.contains(name)),
            _ => false,
        };
        if by_name || is_content(&one.source) {
            return plain(one.target).map(|_| true);
        }
    }
    Some(false)
}

/// What of a template matters here.
#[derive(Debug, Default)]
struct Outline<'a> {
    loops: Vec<Binding<'a>>,
    assignments: Vec<Binding<'a>>,
    macros: Vec<Macro<'a>>,
    /// Everything that looks like a call of a name.
    calls: Vec<Call<'a>>,
}

#[derive(Debug)]
struct Macro<'a> {
    name: &'a str,
    parameters: Vec<&'a str>,
    range: std::ops::Range<usize>,
}

#[derive(Debug)]
struct Call<'a> {
    name: &'a str,
    arguments: Vec<Vec<Token<'a>>>,
}

impl<'a> Macro<'a> {
    /// Parameters that some call gives what `is_wanted` accepts.
    fn given(&self, calls: &[Call<'a>], is_wanted: &dyn Fn(&[Token<'_>]) -> bool) -> Vec<&'a str> {
        let mut given = Vec::new();
        for call in calls.iter().filter(|call| call.name == self.name) {
            for (at, argument) in call.arguments.iter().enumerate() {
                let (parameter, value) = match argument.as_slice() {
                    [Token::Name(name), Token::Other('='), value @ ..]
                        if value.first() != Some(&Token::Other('=')) =>
                    {
                        let known = self.parameters.iter().find(|p| *p == name);
                        (known.copied(), value)
                    }
                    value => (self.parameters.get(at).copied(), value),
                };
                given.extend(parameter.filter(|_| is_wanted(value)));
            }
        }
        given
    }
}

impl<'a> Outline<'a> {
    fn read(template: &'a str) -> Self {
        let mut outline = Self::default();
        let mut open: Vec<Macro<'a>> = Vec::new();
        let mut at = 0;
        while let Some(tag) = Tag::next(template, at) {
            at = tag.end;
            outline.calls.extend(calls(&tokens(tag.text)));
            if !tag.statement {
                continue;
            }
            let (word, rest) = tag
                .text
                .split_once(char::is_whitespace)
                .unwrap_or((tag.text, ""));
            match word {
                "raw" => at = end_of_raw(template, at),
                "for" => {
                    let split = rest.split_once(" in ");
                    outline
                        .loops
                        .extend(split.map(|(to, of)| binding(to, of, tag.start)));
                }
                "set" => {
                    let split = rest.split_once('=');
                    let assigned = split.map(|(to, of)| binding(to, of, tag.start));
                    outline.assignments.extend(assigned);
                }
                "macro" => open.extend(Macro::open(rest, tag.start)),
                "endmacro" => {
                    if let Some(mut one) = open.pop() {
                        one.range.end = at;
                        outline.macros.push(one);
                    }
                }
                _ => {}
            }
        }
        // In the order they begin, as the tree has them.
        outline.macros.sort_by_key(|one| one.range.start);
        outline
    }
}

impl<'a> Macro<'a> {
    fn open(signature: &'a str, at: usize) -> Option<Self> {
        let Call { name, arguments } = calls(&tokens(signature)).into_iter().next()?;
        let parameters = arguments.iter().filter_map(|one| match one.first() {
            Some(Token::Name(name)) => Some(*name),
            _ => None,
        });
        Some(Self {
            name,
            parameters: parameters.collect(),
            range: at..usize::MAX,
        })
    }
}

/// One `{% .. %}` or `{{ .. }}`.
#[derive(Debug)]
struct Tag<'a> {
    statement: bool,
    text: &'a str,
    start: usize,
    end: usize,
}

impl<'a> Tag<'a> {
    /// The first tag at or behind `from`, past comments.
    fn next(template: &'a str, mut from: usize) -> Option<Self> {
        loop {
            let rest = template.get(from..)?;
            let mut opens = ["{%", "{{", "{#"].into_iter();
            let start = rest
                .match_indices('{')
                .map(|(at, _)| at)
                .find(|at| opens.clone().any(|open| rest[*at..].starts_with(open)))?;
            let inside = rest.get(start + 2..)?;
            let opened = opens.position(|open| rest[start..].starts_with(open))?;
            if opened == 2 {
                from += start + 2 + inside.find("#}")? + 2;
                continue;
            }
            let close = ["%}", "}}"][opened];
            let length = close_of(inside, close)?;
            return Some(Self {
                statement: opened == 0,
                text: inside.get(..length)?.trim_matches(['-', '+']).trim(),
                start: from + start,
                end: from + start + 2 + length + 2,
            });
        }
    }
}

/// Where `close` lies outside of quotes.
fn close_of(inside: &str, close: &str) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            None if inside.get(at..)?.starts_with(close) => return Some(at),
            None if c == '\'' || c == '"' => quote = Some(c),
            _ => {}
        }
    }
    None
}

/// Behind the `endraw` that ends what begins at `from`.
fn end_of_raw(template: &str, from: usize) -> usize {
    let rest = template.get(from..).unwrap_or_default();
    rest.find("endraw").map_or(template.len(), |at| from + at)
}

/// Names with arguments, the outer ones first.
fn calls<'a>(tokens: &[Token<'a>]) -> Vec<Call<'a>> {
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        let Some([Token::Name(name), Token::Other('('), inner @ ..]) = tokens.get(at..) else {
            continue;
        };
        let is_method = at > 0 && tokens.get(at - 1) == Some(&Token::Other('.'));
        let Some(end) = closing(inner, ')').filter(|_| !is_method) else {
            continue;
        };
        let (mut arguments, mut depth) = (vec![Vec::new()], 0_usize);
        for token in inner.iter().take(end) {
            match token {
                Token::Other(',') if depth == 0 => {
                    arguments.push(Vec::new());
                    continue;
                }
                Token::Other('(' | '[' | '{') => depth += 1,
                Token::Other(')' | ']' | '}') => depth = depth.saturating_sub(1),
                _ => {}
            }
            if let Some(last) = arguments.last_mut() {
                last.push(*token);
            }
        }
        found.push(Call { name, arguments });
    }
    found
}

fn plain(target: &str) -> Option<&str> {
    let name = |c: char| c.is_alphanumeric() || c == '_';
    target.chars().all(name).then_some(target)
}

fn binding<'a>(target: &'a str, source: &'a str, at: usize) -> Binding<'a> {
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
        at,
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
    let [Token::Name(first), rest @ ..] = without_brackets(source) else {
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

fn without_brackets<'t, 'a>(mut source: &'t [Token<'a>]) -> &'t [Token<'a>] {
    while let [Token::Other('('), inner @ .., Token::Other(')')] = source {
        if !balanced(inner) {
            break;
        }
        source = inner;
    }
    source
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
    fn a_macro_that_is_given_content_wants_parts() {
        let with = |call: &str| {
            format!(
                "{{% macro show(label, parts) %}}{{% for p in parts %}}x{{% endfor %}}{{% endmacro %}}{{% for m in messages %}}{{{{ {call} }}}}{{% endfor %}}"
            )
        };
        assert!(is_parts(&with("show('a', m.content)")));
        assert!(is_parts(&with("show(m.role, parts=m['content']) | trim")));
        assert!(is_parts(&with("f(1) ~ show('}}', (m.content))")));
        assert!(!is_parts(&with("show(m.content, m.role)")));
        assert!(!is_parts(&with("show('a', m.content.text)")));
        assert!(!is_parts(&with("x.show('a', m.content)")));
        assert!(!is_parts(&with("show('a', other.content)")));
    }

    #[test]
    fn a_loop_over_a_variable_called_content_wants_parts_outside_macros() {
        let body = "{% for c in content %}x{% endfor %}";
        assert!(is_parts(body));
        assert!(is_parts("{% for c in content if c.text %}x{% endfor %}"));
        assert!(!is_parts("{% for c in content | list %}x{% endfor %}"));
        assert!(!is_parts("{% for c in contents %}x{% endfor %}"));
        assert!(!is_parts(&format!(
            "{{% macro f(content) %}}{body}{{% endmacro %}}"
        )));
    }

    #[test]
    fn comments_raw_text_and_quotes_hold_no_statements() {
        assert!(!is_parts("{# {% for c in content %} #}"));
        assert!(!is_parts("{% raw %}{% for c in content %}{% endraw %}"));
        assert!(!is_parts("{{ '{% for c in content %}' }}"));
        assert!(is_parts(
            "{# x #}{{ '%}' }}{%- for c in content -%}{%- endfor -%}"
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
