//! How many tokens a media item stands for when no tokenizer is asked: the `estimate` settings of
//! `token-producer` and the request headers that override them.
//!
//! - image: `staticToken`, or `max(1, width * height / factor)`
//! - video: `max(1, min(frames * tokensPerFrame, maxVideoTokens))`, where `tokensPerFrame` is counted
//!   as an image is, and `frames` is `clamp(duration * sampleFPS, minFrames, maxFrames) /
//!   temporalPatchSize` (`sampled`) or `clamp(duration * sourceFPS / frameStride, minFrames,
//!   maxFrames)` (`strided`)
//! - audio: `max(1, ceil(bytes / 4))` of data and format name as sent
//!
//! Every division and product with a fraction is rounded down. Formulas and defaults: llm-d-router:
//! `pkg/epp/framework/plugins/requestcontrol/dataproducer/tokenizer/README.md`, and for the rounding
//! and `sampleFPS` its `mm_estimate.go`, which the README contradicts (1).

use serde::Deserialize;

use crate::plugin::ParamError;
use crate::request::text::BYTES_PER_TOKEN;
use crate::request::{Extent, Headers, MediaItem};

/// Size of an image or frame that tells none, in pixels.
const DEFAULT_WIDTH: u64 = 640;
/// See [`DEFAULT_WIDTH`].
const DEFAULT_HEIGHT: u64 = 360;
/// Pixels that one token covers.
const DEFAULT_FACTOR: u64 = 1024;
/// Seconds of a video that tells no length.
const DEFAULT_DURATION_SECONDS: f64 = 10.0;
/// Frames a second that a model samples.
const DEFAULT_SAMPLE_FPS: f64 = 2.0;
/// Frames a second of a video that tells none.
const DEFAULT_SOURCE_FPS: f64 = 24.0;

/// Source frame rate of the request's videos; used by `strided` only, since a sampling rate belongs
/// to the model.
const FPS_HEADER: &str = "x-llm-d-video-fps";
/// Length of the request's videos in seconds.
const DURATION_HEADER: &str = "x-llm-d-video-duration-seconds";
/// Size of their frames, `WIDTHxHEIGHT`.
const RESOLUTION_HEADER: &str = "x-llm-d-video-resolution";

/// `estimate` as the document has it. Absent, `null` and 0 mean the default.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct EstimateSettings {
    image: Option<ImageSettings>,
    video: Option<VideoSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct ImageSettings {
    mode: String,
    default_resolution: Option<Resolution>,
    dynamic: Option<DynamicSettings>,
    #[serde(rename = "static")]
    fixed: Option<StaticImageSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Resolution {
    width: i64,
    height: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct DynamicSettings {
    factor: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct StaticImageSettings {
    static_token: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct VideoSettings {
    default_resolution: Option<Resolution>,
    default_duration: f64,
    tokens_per_frame: Option<PerFrameSettings>,
    frames: Option<FramesSettings>,
    max_video_tokens: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct PerFrameSettings {
    mode: String,
    dynamic: Option<DynamicSettings>,
    #[serde(rename = "static")]
    fixed: Option<StaticFrameSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct StaticFrameSettings {
    num_tokens_per_frame: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct FramesSettings {
    mode: String,
    min_frames: i64,
    max_frames: i64,
    sampled: Option<SampledSettings>,
    strided: Option<StridedSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct SampledSettings {
    #[serde(rename = "sampleFPS")]
    sample_fps: f64,
    temporal_patch_size: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct StridedSettings {
    #[serde(rename = "defaultSourceFPS")]
    default_source_fps: f64,
    frame_stride: i64,
}

/// The estimate in force.
#[derive(Debug)]
pub(super) struct MediaEstimate {
    image: StillTokens,
    video: VideoTokens,
}

/// Tokens of an image or of one frame.
#[derive(Debug)]
enum StillTokens {
    Static(u64),
    Dynamic { default_pixels: u64, factor: u64 },
}

#[derive(Debug)]
struct VideoTokens {
    per_frame: StillTokens,
    frames: Frames,
    min_frames: u64,
    max_frames: u64,
    duration_seconds: f64,
    max_tokens: u64,
}

#[derive(Debug)]
enum Frames {
    Sampled { fps: f64, merged: u64 },
    Strided { source_fps: f64, stride: u64 },
}

/// What the request's headers say about its videos; a malformed value counts as absent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct VideoHints {
    fps: Option<f64>,
    duration_seconds: Option<f64>,
    pixels: Option<u64>,
}

impl VideoHints {
    /// Reads the three headers.
    pub(super) fn of(headers: &Headers) -> Self {
        let number = |name| {
            let value = headers.get_str(name)?.trim().parse::<f64>().ok()?;
            (value.is_finite() && value > 0.0).then_some(value)
        };
        Self {
            fps: number(FPS_HEADER),
            duration_seconds: number(DURATION_HEADER),
            pixels: headers.get_str(RESOLUTION_HEADER).and_then(pixels_of),
        }
    }
}

/// Pixels of `WIDTHxHEIGHT`.
fn pixels_of(resolution: &str) -> Option<u64> {
    let (width, height) = resolution.split_once(['x', 'X'])?;
    let side = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n > 0);
    Some(u64::from(side(width)?) * u64::from(side(height)?))
}

impl StillTokens {
    fn tokens(&self, pixels: Option<u64>) -> u64 {
        match self {
            Self::Static(tokens) => *tokens,
            Self::Dynamic {
                default_pixels,
                factor,
            } => (pixels.unwrap_or(*default_pixels) / factor).max(1),
        }
    }
}

impl VideoTokens {
    fn tokens(&self, hints: &VideoHints) -> u64 {
        let frames = self.frames(hints);
        let tokens = frames.saturating_mul(self.per_frame.tokens(hints.pixels));
        tokens.min(self.max_tokens).max(1)
    }

    /// Frames that cost tokens; 0 for a clip shorter than one group.
    fn frames(&self, hints: &VideoHints) -> u64 {
        let seconds = hints.duration_seconds.unwrap_or(self.duration_seconds);
        let clamp = |frames: u64| frames.max(self.min_frames).min(self.max_frames);
        match self.frames {
            Frames::Sampled { fps, merged } => clamp(whole(seconds * fps)) / merged,
            Frames::Strided { source_fps, stride } => {
                clamp(whole(seconds * hints.fps.unwrap_or(source_fps)) / stride)
            }
        }
    }
}

/// Rounds down.
fn whole(frames: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float cast saturates"
    )]
    let frames = frames as u64;
    frames
}

impl MediaEstimate {
    /// Tokens of `item`, at least 1: what the client said, else the estimate. `video` is asked for
    /// the request's hints when the item needs them.
    pub(super) fn tokens(&self, item: &MediaItem, video: impl FnOnce() -> VideoHints) -> u64 {
        if let Some(tokens) = item.tokens {
            return u64::from(tokens).max(1);
        }
        match (item.modality, item.extent) {
            ("video", _) => self.video.tokens(&video()),
            (_, Extent::Bytes(bytes)) => bytes.div_ceil(BYTES_PER_TOKEN).max(1),
            (_, Extent::Pixels { width, height }) => {
                let pixels = u64::from(width) * u64::from(height);
                self.image.tokens(Some(pixels))
            }
            (_, Extent::Unknown) => self.image.tokens(None),
        }
    }
}

impl EstimateSettings {
    /// Checks every field and fills defaults in.
    pub(super) fn resolve(self) -> Result<MediaEstimate, ParamError> {
        Ok(MediaEstimate {
            image: self.image.unwrap_or_default().resolve()?,
            video: self.video.unwrap_or_default().resolve()?,
        })
    }
}

impl ImageSettings {
    fn resolve(self) -> Result<StillTokens, ParamError> {
        let fixed = self.fixed.unwrap_or_default().static_token;
        let still = StillSettings {
            path: "estimate.image",
            mode: self.mode,
            resolution: (
                "estimate.image.defaultResolution",
                self.default_resolution.unwrap_or_default(),
            ),
            factor: self.dynamic.unwrap_or_default().factor,
            fixed: ("estimate.image.static.staticToken", fixed),
        };
        still.resolve()
    }
}

impl VideoSettings {
    fn resolve(self) -> Result<VideoTokens, ParamError> {
        let per_frame = self.tokens_per_frame.unwrap_or_default();
        let fixed = per_frame.fixed.unwrap_or_default().num_tokens_per_frame;
        let still = StillSettings {
            path: "estimate.video.tokensPerFrame",
            mode: per_frame.mode,
            resolution: (
                "estimate.video.defaultResolution",
                self.default_resolution.unwrap_or_default(),
            ),
            factor: per_frame.dynamic.unwrap_or_default().factor,
            fixed: (
                "estimate.video.tokensPerFrame.static.numTokensPerFrame",
                fixed,
            ),
        };
        let frames = self.frames.unwrap_or_default();
        let min_frames = count("estimate.video.frames.minFrames", frames.min_frames, 0)?;
        let max_frames = count(
            "estimate.video.frames.maxFrames",
            frames.max_frames,
            u64::MAX,
        )?;
        if min_frames > max_frames {
            return Err(ParamError(format!(
                "estimate.video.frames.minFrames: {min_frames} is above maxFrames, {max_frames}"
            )));
        }
        Ok(VideoTokens {
            per_frame: still.resolve()?,
            frames: frames.resolve()?,
            min_frames,
            max_frames,
            duration_seconds: positive(
                "estimate.video.defaultDuration",
                self.default_duration,
                DEFAULT_DURATION_SECONDS,
            )?,
            max_tokens: count(
                "estimate.video.maxVideoTokens",
                self.max_video_tokens,
                u64::MAX,
            )?,
        })
    }
}

impl FramesSettings {
    fn resolve(self) -> Result<Frames, ParamError> {
        let sampled = self.sampled.unwrap_or_default();
        let strided = self.strided.unwrap_or_default();
        let fps = positive(
            "estimate.video.frames.sampled.sampleFPS",
            sampled.sample_fps,
            DEFAULT_SAMPLE_FPS,
        )?;
        let merged = count(
            "estimate.video.frames.sampled.temporalPatchSize",
            sampled.temporal_patch_size,
            1,
        )?;
        let source_fps = positive(
            "estimate.video.frames.strided.defaultSourceFPS",
            strided.default_source_fps,
            DEFAULT_SOURCE_FPS,
        )?;
        let stride = count(
            "estimate.video.frames.strided.frameStride",
            strided.frame_stride,
            1,
        )?;
        match self.mode.as_str() {
            "" | "sampled" => Ok(Frames::Sampled { fps, merged }),
            "strided" => Ok(Frames::Strided { source_fps, stride }),
            other => Err(ParamError(format!(
                "estimate.video.frames.mode: {other:?} is neither \"sampled\" nor \"strided\""
            ))),
        }
    }
}

/// What image and frame settings have in common, with the names their errors use.
struct StillSettings {
    path: &'static str,
    mode: String,
    resolution: (&'static str, Resolution),
    factor: i64,
    fixed: (&'static str, i64),
}

impl StillSettings {
    fn resolve(self) -> Result<StillTokens, ParamError> {
        let (name, resolution) = self.resolution;
        let width = count(&format!("{name}.width"), resolution.width, DEFAULT_WIDTH)?;
        let height = count(&format!("{name}.height"), resolution.height, DEFAULT_HEIGHT)?;
        let factor = count(
            &format!("{}.dynamic.factor", self.path),
            self.factor,
            DEFAULT_FACTOR,
        )?;
        let (name, fixed) = self.fixed;
        let fixed = count(name, fixed, 0)?;
        match self.mode.as_str() {
            "" | "dynamic" => Ok(StillTokens::Dynamic {
                default_pixels: width.saturating_mul(height),
                factor,
            }),
            "static" if fixed > 0 => Ok(StillTokens::Static(fixed)),
            "static" => Err(ParamError(format!(
                "{name}: must be above 0 when mode is \"static\""
            ))),
            other => Err(ParamError(format!(
                "{}.mode: {other:?} is neither \"dynamic\" nor \"static\"",
                self.path
            ))),
        }
    }
}

/// A whole number; 0 means `default`.
fn count(name: &str, value: i64, default: u64) -> Result<u64, ParamError> {
    match u64::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) => Ok(value),
        Err(_) => Err(ParamError(format!("{name}: {value} is below 0"))),
    }
}

/// A number; 0 means `default`.
fn positive(name: &str, value: f64, default: f64) -> Result<f64, ParamError> {
    if value < 0.0 {
        return Err(ParamError(format!("{name}: {value} is below 0")));
    }
    Ok(if value > 0.0 { value } else { default })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(json: &str) -> MediaEstimate {
        let settings: EstimateSettings = serde_json::from_str(json).unwrap();
        settings.resolve().unwrap()
    }

    fn item(modality: &'static str, extent: Extent) -> MediaItem {
        MediaItem {
            modality,
            hash: 1,
            identifier: None,
            token_offset: None,
            tokens: None,
            extent,
        }
    }

    fn hints(headers: &[(&str, &'static str)]) -> VideoHints {
        let lines = headers.iter().map(|(name, value)| {
            (
                (*name).to_owned(),
                bytes::Bytes::from_static(value.as_bytes()),
            )
        });
        VideoHints::of(&lines.collect())
    }

    fn video(json: &str, headers: &[(&str, &'static str)]) -> u64 {
        let item = item("video", Extent::Unknown);
        estimate(json).tokens(&item, || hints(headers))
    }

    #[test]
    fn an_image_costs_its_area_by_the_factor() {
        let pixels = |width, height| Extent::Pixels { width, height };
        for (settings, extent, tokens) in [
            // 640 * 360 / 1024 = 225.
            ("{}", Extent::Unknown, 225),
            // 1920 * 1080 / 1024 = 2025.
            ("{}", pixels(1920, 1080), 2025),
            // 100 * 100 / 1024 = 9.8, rounded down; less than a token counts one.
            ("{}", pixels(100, 100), 9),
            ("{}", pixels(10, 10), 1),
            // 1280 * 720 / 784 = 1175.5.
            (
                r#"{"image": {"defaultResolution": {"width": 1280, "height": 720}, "dynamic": {"factor": 784}}}"#,
                Extent::Unknown,
                1175,
            ),
            // Only the width is given: 1280 * 360 / 1024 = 450.
            (
                r#"{"image": {"defaultResolution": {"width": 1280}}}"#,
                Extent::Unknown,
                450,
            ),
            (
                r#"{"image": {"mode": "static", "static": {"staticToken": 280}}}"#,
                pixels(1920, 1080),
                280,
            ),
            (r#"{"image": null, "video": null}"#, Extent::Unknown, 225),
        ] {
            let found = estimate(settings).tokens(&item("image", extent), VideoHints::default);
            assert_eq!(found, tokens, "{settings} {extent:?}");
        }
    }

    #[test]
    fn a_video_costs_frames_by_tokens_per_frame() {
        for (settings, tokens) in [
            // 10 s * 2 fps = 20 frames of 225.
            ("{}", 4500),
            // Frame pairs: 20 / 2 = 10 groups.
            (
                r#"{"video": {"frames": {"sampled": {"temporalPatchSize": 2}}}}"#,
                2250,
            ),
            // 5 s * 1.5 fps = 7.5, so 7 frames; 4 at most, then 4 / 3 = 1 group.
            (
                r#"{"video": {"defaultDuration": 5, "frames": {"maxFrames": 4, "sampled": {"sampleFPS": 1.5, "temporalPatchSize": 3}}}}"#,
                225,
            ),
            // 0.4 s * 2 fps is no frame, 4 at least: 4 / 2 * 225.
            (
                r#"{"video": {"defaultDuration": 0.4, "frames": {"minFrames": 4, "sampled": {"temporalPatchSize": 2}}}}"#,
                450,
            ),
            // No group at all still counts one token.
            (
                r#"{"video": {"defaultDuration": 0.5, "frames": {"sampled": {"temporalPatchSize": 2}}}}"#,
                1,
            ),
            // 10 s * 24 fps / 1.
            (
                r#"{"video": {"frames": {"mode": "strided"}, "tokensPerFrame": {"mode": "static", "static": {"numTokensPerFrame": 3}}}}"#,
                720,
            ),
            // 10 s * 30 fps / 7 = 42.8 frames, 32 at most, of 70.
            (
                r#"{"video": {"frames": {"mode": "strided", "maxFrames": 32, "strided": {"defaultSourceFPS": 30, "frameStride": 7}}, "tokensPerFrame": {"mode": "static", "static": {"numTokensPerFrame": 70}}}}"#,
                2240,
            ),
            // 20 * (1280 * 720 / 784 = 1175) = 23500, capped.
            (
                r#"{"video": {"defaultResolution": {"width": 1280, "height": 720}, "tokensPerFrame": {"mode": "dynamic", "dynamic": {"factor": 784}}, "maxVideoTokens": 16384}}"#,
                16384,
            ),
        ] {
            assert_eq!(video(settings, &[]), tokens, "{settings}");
        }
    }

    #[test]
    fn headers_override_settings_and_malformed_ones_do_not() {
        let strided =
            r#"{"video": {"frames": {"mode": "strided", "strided": {"frameStride": 10}}}}"#;
        for (settings, headers, tokens) in [
            // 3.5 s * 2 fps = 7 frames of 225.
            ("{}", &[(DURATION_HEADER, "3.5")][..], 1575),
            // 1280 * 720 / 1024 = 900 by 20 frames.
            ("{}", &[(RESOLUTION_HEADER, "1280x720")], 18_000),
            ("{}", &[(RESOLUTION_HEADER, " 1280 X 720 ")], 18_000),
            // Sampling is the model's own rate.
            ("{}", &[(FPS_HEADER, "60")], 4500),
            // 10 s * 30 fps / 10 = 30 frames of 225; without the header 24.
            (strided, &[(FPS_HEADER, "30")], 6750),
            (strided, &[(FPS_HEADER, "0")], 5400),
            ("{}", &[(DURATION_HEADER, "-3")], 4500),
            ("{}", &[(DURATION_HEADER, "inf")], 4500),
            ("{}", &[(DURATION_HEADER, "soon")], 4500),
            ("{}", &[(RESOLUTION_HEADER, "1280")], 4500),
            ("{}", &[(RESOLUTION_HEADER, "1280x")], 4500),
            ("{}", &[(RESOLUTION_HEADER, "0x720")], 4500),
            ("{}", &[(RESOLUTION_HEADER, "1280x720x3")], 4500),
        ] {
            assert_eq!(video(settings, headers), tokens, "{settings} {headers:?}");
        }
    }

    #[test]
    fn absurd_headers_saturate() {
        let headers = [
            (DURATION_HEADER, "1e300"),
            (RESOLUTION_HEADER, "4294967295x4294967295"),
        ];
        assert_eq!(video("{}", &headers), u64::MAX);
        assert_eq!(video(r#"{"video": {"maxVideoTokens": 5}}"#, &headers), 5);
    }

    #[test]
    fn audio_is_four_bytes_a_token_and_a_clients_length_wins() {
        let estimate = estimate("{}");
        let tokens = |item: &MediaItem| estimate.tokens(item, VideoHints::default);
        // ceil(9 / 4) = 3.
        assert_eq!(tokens(&item("audio", Extent::Bytes(9))), 3);
        assert_eq!(tokens(&item("audio", Extent::Bytes(0))), 1);
        let mut image = item("image", Extent::Unknown);
        image.tokens = Some(77);
        assert_eq!(tokens(&image), 77);
    }

    #[test]
    fn errors_name_the_field() {
        for (settings, wanted) in [
            (
                r#"{"image": {"mode": "fixed"}}"#,
                r#"estimate.image.mode: "fixed" is neither"#,
            ),
            (
                r#"{"image": {"mode": "static"}}"#,
                "estimate.image.static.staticToken: must be above 0",
            ),
            (
                r#"{"image": {"dynamic": {"factor": -1}}}"#,
                "estimate.image.dynamic.factor: -1 is below 0",
            ),
            (
                r#"{"image": {"defaultResolution": {"height": -2}}}"#,
                "estimate.image.defaultResolution.height: -2",
            ),
            (
                r#"{"video": {"tokensPerFrame": {"mode": "static"}}}"#,
                "estimate.video.tokensPerFrame.static.numTokensPerFrame: must be",
            ),
            (
                r#"{"video": {"tokensPerFrame": {"mode": "x"}}}"#,
                "estimate.video.tokensPerFrame.mode",
            ),
            (
                r#"{"video": {"defaultResolution": {"width": -1}}}"#,
                "estimate.video.defaultResolution.width",
            ),
            (
                r#"{"video": {"frames": {"mode": "x"}}}"#,
                "estimate.video.frames.mode",
            ),
            (
                r#"{"video": {"frames": {"minFrames": 8, "maxFrames": 4}}}"#,
                "estimate.video.frames.minFrames: 8 is above maxFrames, 4",
            ),
            (
                r#"{"video": {"frames": {"sampled": {"sampleFPS": -1}}}}"#,
                "estimate.video.frames.sampled.sampleFPS",
            ),
            (
                r#"{"video": {"frames": {"sampled": {"temporalPatchSize": -1}}}}"#,
                "estimate.video.frames.sampled.temporalPatchSize",
            ),
            (
                r#"{"video": {"frames": {"strided": {"defaultSourceFPS": -1}}}}"#,
                "estimate.video.frames.strided.defaultSourceFPS",
            ),
            (
                r#"{"video": {"frames": {"strided": {"frameStride": -1}}}}"#,
                "estimate.video.frames.strided.frameStride",
            ),
            (
                r#"{"video": {"defaultDuration": -1}}"#,
                "estimate.video.defaultDuration",
            ),
            (
                r#"{"video": {"maxVideoTokens": -1}}"#,
                "estimate.video.maxVideoTokens",
            ),
        ] {
            let parsed: EstimateSettings = serde_json::from_str(settings).unwrap();
            let error = parsed.resolve().unwrap_err().to_string();
            assert!(error.contains(wanted), "{settings}: {error}");
        }
        let unknown = serde_json::from_str::<EstimateSettings>(r#"{"image": {"factor": 3}}"#);
        assert!(unknown.unwrap_err().to_string().contains("`factor`"));
    }
}
