//! What a check says.

use std::fmt;

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, and will hurt some day, or costs something now.
    Warning,
    /// Requests fail, or go where they should not.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which check: a word that scripts can look for.
    pub check: &'static str,
    /// What it is about: an address, an object, a filter.
    pub subject: String,
    /// What was seen.
    pub message: String,
    /// What to do; none for what is as it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Everything that was looked at, in the order of a request's way.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// One after the other.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Notes that something is as it should be.
    pub fn ok(
        &mut self,
        check: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.findings.push(Finding {
            severity: Severity::Ok,
            check,
            subject: subject.into(),
            message: message.into(),
            fix: None,
        });
    }

    /// Notes what will hurt some day.
    pub fn warning(
        &mut self,
        check: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problem(Severity::Warning, check, subject, message, fix);
    }

    /// Notes what is broken.
    pub fn error(
        &mut self,
        check: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problem(Severity::Error, check, subject, message, fix);
    }

    fn problem(
        &mut self,
        severity: Severity,
        check: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.findings.push(Finding {
            severity,
            check,
            subject: subject.into(),
            message: message.into(),
            fix: Some(fix.into()),
        });
    }

    /// Adds what another check found.
    pub fn append(&mut self, other: Report) {
        self.findings.extend(other.findings);
    }

    /// Findings of one severity.
    pub fn count(&self, severity: Severity) -> usize {
        let same = |f: &&Finding| f.severity == severity;
        self.findings.iter().filter(same).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match finding.severity {
                Severity::Ok => "ok",
                Severity::Warning => "warning",
                Severity::Error => "ERROR",
            };
            writeln!(
                f,
                "{mark:<8} {}  {}: {}",
                finding.check, finding.subject, finding.message
            )?;
            for line in finding.fix.iter().flat_map(|fix| fix.lines()) {
                writeln!(f, "         -> {line}")?;
            }
        }
        writeln!(
            f,
            "{} errors, {} warnings, {} as they should be",
            self.count(Severity::Error),
            self.count(Severity::Warning),
            self.count(Severity::Ok)
        )
    }
}
