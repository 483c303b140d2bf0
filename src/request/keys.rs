//! The field names that any parser looks at; all others are [`Key::Other`].

macro_rules! keys {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// A known field name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each variant is its own field name")]
        pub enum Key {
            $($name,)*
            /// Any other name.
            Other,
        }

        impl Key {
            /// The key spelled `text`, case-sensitively.
            pub fn of(text: &[u8]) -> Self {
                match text {
                    $($text => Self::$name,)*
                    _ => Self::Other,
                }
            }
        }
    };
}

keys! {
    Model = b"model",
    Stream = b"stream",
    Messages = b"messages",
    Role = b"role",
    Content = b"content",
    Text = b"text",
    Type = b"type",
    ImageUrl = b"image_url",
    VideoUrl = b"video_url",
    InputAudio = b"input_audio",
    Url = b"url",
    Data = b"data",
    Format = b"format",
    Tools = b"tools",
    Prompt = b"prompt",
    Input = b"input",
    Instructions = b"instructions",
    Items = b"items",
    CacheSalt = b"cache_salt",
    Echo = b"echo",
    Logprobs = b"logprobs",
    TopLogprobs = b"top_logprobs",
    PromptLogprobs = b"prompt_logprobs",
    MaxTokens = b"max_tokens",
    MaxCompletionTokens = b"max_completion_tokens",
    MaxOutputTokens = b"max_output_tokens",
    MaxNewTokens = b"max_new_tokens",
    SamplingParams = b"sampling_params",
    TokenIds = b"token_ids",
    InputIds = b"input_ids",
    ExtraKey = b"extra_key",
    Features = b"features",
    MmHashes = b"mm_hashes",
    MmPlaceholders = b"mm_placeholders",
    Image = b"image",
    Video = b"video",
    Audio = b"audio",
    Offset = b"offset",
    Length = b"length",
    System = b"system",
    Thinking = b"thinking",
    Id = b"id",
    Name = b"name",
    ToolUseId = b"tool_use_id",
    Source = b"source",
}
