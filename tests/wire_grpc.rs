//! gRPC exchanges as Envoy delivers them: one request message, messages back, trailers.

use metrics_exporter_prometheus::PrometheusBuilder;

use super::*;

const CONFIG: &str = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: vllmgrpc-parser}
- {type: vertexai-parser}
requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}, {pluginRef: vertexai-parser}]}
";

const GENERATE: &str = "/vllm.grpc.engine.VllmEngine/Generate";
const EMBED: &str = "/vllm.grpc.engine.VllmEngine/Embed";
const CHAT: &str = "/google.cloud.aiplatform.v1beta1.PredictionService/ChatCompletions";

/// A frame: flag 0, length, message.
fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), message].concat()
}

/// tokenized = 2 {input_ids = 2: [1, 2, 3]}; stream = 5.
const REQUEST: &[u8] = &[0x12, 0x05, 0x12, 0x03, 1, 2, 3, 0x28, 1];
/// chunk = 1 {token_ids = 1: [9]}.
const CHUNK: &[u8] = &[0x0a, 0x03, 0x0a, 0x01, 9];
/// complete = 2 {prompt_tokens = 3: 11, completion_tokens = 4: 4, cached_tokens = 5: 8}.
const COMPLETE: &[u8] = &[0x12, 0x06, 0x18, 11, 0x20, 4, 0x28, 8];
/// embedding = 1: [0.0], prompt_tokens = 2: 3.
const EMBEDDING: &[u8] = &[0x0a, 0x04, 0, 0, 0, 0, 0x10, 3];

fn call(path: &str, more: &[(&str, &str)]) -> ProcessingRequest {
    let mut lines = vec![
        (":method", "POST"),
        (":path", path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    lines.extend(more);
    message(Request::RequestHeaders(headers(&lines, false)))
}

fn trailers() -> ProcessingRequest {
    message(Request::ResponseTrailers(HttpTrailers::default()))
}

/// Runs `test` on a picker with the gRPC parsers and returns the metrics it wrote.
fn measured(test: impl FnOnce(&Picker)) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        test(&picker_with(Some(CONFIG), "10.0.0.7:8000"));
    });
    handle.render()
}

/// Sum and count of a histogram without model names.
fn tokens(metrics: &str, kind: &str) -> (f64, f64) {
    let value = |suffix: &str| {
        let name = format!("llm_d_epp_request_{kind}_tokens_{suffix}{{");
        let line = metrics.lines().find(|l| l.starts_with(&name));
        line.map_or(0.0, |l| l.rsplit_once(' ').unwrap().1.parse().unwrap())
    };
    (value("sum"), value("count"))
}

#[test]
fn a_unary_call_is_answered_message_by_message() {
    let metrics = measured(|picker| {
        let mut exchange = picker.exchange();
        let request = frame(&[0x12, 0x05, 0x12, 0x03, 1, 2, 3]);
        let replies = run(
            &mut exchange,
            [call(EMBED, &[]), request_body(&request, true)],
        );
        assert_eq!(kinds(&replies), ["request headers", "request body"]);
        assert_eq!(
            set_headers(&replies[0])["x-gateway-destination-endpoint"],
            "10.0.0.7:8000"
        );
        assert_eq!(streamed(&replies, "request body"), (request, true));
        assert_eq!(picker.in_flight(), 1);

        let response = frame(EMBEDDING);
        let replies = run(
            &mut exchange,
            [response_headers(false), response_body(&response, false)],
        );
        assert_eq!(kinds(&replies), ["response headers", "response body"]);
        assert_eq!(streamed(&replies, "response body"), (response, false));
        assert_eq!(picker.in_flight(), 1, "trailers are still to come");
        let replies = run(&mut exchange, [trailers()]);
        assert_eq!(kinds(&replies), ["response trailers"]);
        assert_eq!(picker.in_flight(), 0);
        assert!(exchange.on_end());
    });
    assert_eq!(tokens(&metrics, "input"), (3.0, 1.0), "{metrics}");
    assert_eq!(tokens(&metrics, "output"), (0.0, 0.0));
}

#[test]
fn a_stream_is_echoed_piece_by_piece_and_counted() {
    let metrics = measured(|picker| {
        let mut exchange = picker.exchange();
        let request = frame(REQUEST);
        let (head, tail) = request.split_at(7);
        let first = [call(GENERATE, &[]), request_body(head, false)];
        assert!(run(&mut exchange, first).is_empty(), "deferred");
        let replies = run(&mut exchange, [request_body(tail, true)]);
        assert_eq!(streamed(&replies, "request body"), (request.clone(), true));

        run(&mut exchange, [response_headers(false)]);
        // The last message is cut inside its header and inside its counts.
        let all = [frame(CHUNK), frame(CHUNK), frame(COMPLETE)].concat();
        let mut returned = Vec::new();
        for piece in [&all[..10], &all[10..23], &all[23..29], &all[29..]] {
            let replies = run(&mut exchange, [response_body(piece, false)]);
            let (bytes, ended) = streamed(&replies, "response body");
            assert_eq!((&bytes[..], ended), (piece, false), "at once");
            returned.extend(bytes);
        }
        assert_eq!(returned, all);
        assert_eq!(
            kinds(&run(&mut exchange, [trailers()])),
            ["response trailers"]
        );
        assert_eq!(picker.in_flight(), 0);
    });
    assert_eq!(tokens(&metrics, "input"), (11.0, 1.0), "{metrics}");
    assert_eq!(tokens(&metrics, "output"), (4.0, 1.0));
    assert_eq!(tokens(&metrics, "cached"), (8.0, 1.0));
}

#[test]
fn a_failed_call_is_headers_only() {
    let metrics = measured(|picker| {
        let mut exchange = picker.exchange();
        run(
            &mut exchange,
            [call(GENERATE, &[]), request_body(&frame(REQUEST), true)],
        );
        assert_eq!(picker.in_flight(), 1);
        let replies = run(&mut exchange, [response_headers(true)]);
        assert_eq!(kinds(&replies), ["response headers"]);
        assert_eq!(picker.in_flight(), 0);
        assert!(exchange.on_end());
    });
    assert_eq!(tokens(&metrics, "input"), (0.0, 0.0), "{metrics}");
}

#[test]
fn unreadable_requests_are_refused() {
    let picker = picker_with(Some(CONFIG), "10.0.0.7:8000");
    for (path, body, text) in [
        (
            GENERATE,
            vec![1, 0, 0, 0, 0],
            "invalid or unsupported gRPC payload",
        ),
        (GENERATE, frame(&[]), "not supported request inputType"),
        (EMBED, frame(&[]), "missing tokenized input in EmbedRequest"),
        (CHAT, frame(&[]), "ChatCompletionsRequest has no HttpBody"),
        (
            "/vllm.grpc.engine.VllmEngine/Abort",
            frame(&[]),
            "no parser registered matching path suffix for: /vllm.grpc.engine.VllmEngine/Abort",
        ),
    ] {
        let mut exchange = picker.exchange();
        let replies = run(&mut exchange, [call(path, &[]), request_body(&body, true)]);
        let wanted = format!("inference error: BadRequest - {text}");
        assert_eq!(immediate(&replies[0]), (400, wanted));
        assert!(exchange.is_closed());
    }
    assert_eq!(picker.in_flight(), 0);
}

#[test]
fn a_wrapped_body_keeps_its_model_in_both_directions() {
    // `data` = 2 of an `HttpBody`, which is `http_body` = 2 of the request.
    let field = |content: &[u8]| {
        let length = u8::try_from(content.len()).unwrap();
        assert!(length < 0x80, "a length of one byte");
        [&[0x12, length][..], content].concat()
    };
    let json = br#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
    let request = frame(&field(&field(json)));
    let answer =
        br#"{"model":"other","usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}"#;
    let response = frame(&field(answer));
    let metrics = measured(|picker| {
        let mut exchange = picker.exchange();
        let rewrite = [("x-llm-d-model-name-rewrite", "other")];
        let replies = run(
            &mut exchange,
            [call(CHAT, &rewrite), request_body(&request, true)],
        );
        assert_eq!(streamed(&replies, "request body"), (request.clone(), true));
        let (head, tail) = response.split_at(20);
        let replies = run(
            &mut exchange,
            [
                response_headers(false),
                response_body(head, false),
                response_body(tail, false),
                trailers(),
            ],
        );
        assert_eq!(
            streamed(&replies, "response body"),
            (response.clone(), false)
        );
    });
    assert_eq!(tokens(&metrics, "input"), (5.0, 1.0), "{metrics}");
    assert_eq!(tokens(&metrics, "output"), (2.0, 1.0));
}
