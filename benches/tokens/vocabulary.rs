//! A tokenizer to measure with, and texts: the sources of this crate.

#![expect(clippy::expect_used, reason = "a bench stops where it cannot measure")]

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const VOCABULARY: usize = 32_768;
const LONG_BYTES: usize = 400 << 10;

/// The sources of this crate, file by file.
pub(crate) fn sources() -> Vec<String> {
    let mut texts = Vec::new();
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = open.pop() {
        let entries = std::fs::read_dir(directory).expect("the sources");
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            if path.is_dir() {
                open.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                texts.push(text);
            }
        }
    }
    texts
}

/// Trains a byte-level BPE on the texts, and writes it and a chat template to `directory` as Hugging Face
/// lays them out. Returns the number of entries.
pub(crate) fn train(sources: &[String], directory: &Path) -> usize {
    let split = SplitPattern::Regex(WORDS.to_owned());
    let split = Split::new(split, SplitDelimiterBehavior::Isolated, false).expect("the expression");
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let pieces = sources.iter().flat_map(|text| text.split_inclusive('\n'));
    let words: Vec<String> = pieces.map(ToOwned::to_owned).collect();
    tokenizer
        .train(&mut trainer, words.into_iter())
        .expect("a vocabulary");
    tokenizer
        .save(directory.join("tokenizer.json"), false)
        .expect("a file");
    std::fs::write(directory.join("chat_template.jinja"), TEMPLATE).expect("a file");
    tokenizer.get_vocab_size(true)
}

/// `LONG_BYTES` of text that begins with other files for every `number`.
pub(crate) fn long_text(sources: &[String], number: usize) -> String {
    let mut text = format!("// text {number}\n");
    let start = number * 37 % sources.len();
    for part in sources.iter().cycle().skip(start) {
        text.push_str(part);
        if text.len() >= LONG_BYTES {
            break;
        }
    }
    let end = text.floor_char_boundary(LONG_BYTES);
    text.truncate(end);
    text
}
