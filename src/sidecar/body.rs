//! Bodies on the way out: to engines and to the client.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::engines::LegBody;
use super::spans::RequestSpan;
use super::usage::UsageRewrite;

/// What an engine is sent.
#[derive(Debug)]
pub(super) enum EngineBody {
    /// Slices of the client's body and what was put between them.
    Pieces {
        pieces: std::vec::IntoIter<Bytes>,
        left: u64,
    },
    /// The client's body as it arrives.
    Stream(Incoming),
}

impl EngineBody {
    pub(super) fn empty() -> Self {
        Self::pieces(Vec::new())
    }

    pub(super) fn pieces(pieces: Vec<Bytes>) -> Self {
        Self::Pieces {
            left: pieces.iter().map(|p| p.len() as u64).sum(),
            pieces: pieces.into_iter(),
        }
    }
}

impl Body for EngineBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Pieces { pieces, left } => Poll::Ready(pieces.next().map(|piece| {
                *left -= piece.len() as u64;
                Ok(Frame::data(piece))
            })),
            Self::Stream(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Pieces { left, .. } => *left == 0,
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Pieces { left, .. } => SizeHint::with_exact(*left),
            Self::Stream(body) => body.size_hint(),
        }
    }
}

/// What the client is sent, and the request's span, which ends with it.
#[derive(Debug)]
pub struct AnswerBody(
    Kind,
    #[expect(dead_code, reason = "held until the body is gone")] RequestSpan,
);

#[derive(Debug)]
enum Kind {
    /// Known whole; taken when it was sent.
    Whole(Option<Bytes>),
    /// An engine's answer as it arrives.
    Leg(LegBody),
    /// The same, of which a part was read before.
    After(Bytes, LegBody),
    /// The same with its usage corrected.
    Usage(Box<UsageRewrite>),
    /// An engine's answer while another call goes on; if that fails the answer is cut off.
    Paired {
        leg: LegBody,
        other: Option<AbortOnDropHandle<io::Result<()>>>,
    },
    /// Made by a task of ours.
    Made {
        events: mpsc::Receiver<io::Result<Bytes>>,
        _task: AbortOnDropHandle<()>,
    },
}

impl AnswerBody {
    fn of(kind: Kind) -> Self {
        Self(kind, RequestSpan::default())
    }

    /// Its end is the end of `span`.
    pub(super) fn with_span(self, span: RequestSpan) -> Self {
        Self(self.0, span)
    }

    pub(super) fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::of(Kind::Whole(Some(bytes.into())))
    }

    pub(super) fn leg(leg: LegBody) -> Self {
        Self::of(Kind::Leg(leg))
    }

    pub(super) fn after(read: Bytes, leg: LegBody) -> Self {
        Self::of(Kind::After(read, leg))
    }

    pub(super) fn usage(rewrite: UsageRewrite) -> Self {
        Self::of(Kind::Usage(Box::new(rewrite)))
    }

    pub(super) fn paired(leg: LegBody, other: AbortOnDropHandle<io::Result<()>>) -> Self {
        Self::of(Kind::Paired {
            leg,
            other: Some(other),
        })
    }

    pub(super) fn made(
        events: mpsc::Receiver<io::Result<Bytes>>,
        task: AbortOnDropHandle<()>,
    ) -> Self {
        Self::of(Kind::Made {
            events,
            _task: task,
        })
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut self.get_mut().0 {
            Kind::Whole(bytes) => {
                let bytes = bytes.take().filter(|b| !b.is_empty());
                Poll::Ready(bytes.map(|b| Ok(Frame::data(b))))
            }
            Kind::Leg(leg) => Pin::new(leg).poll_frame(cx),
            Kind::After(read, leg) => {
                if !read.is_empty() {
                    return Poll::Ready(Some(Ok(Frame::data(std::mem::take(read)))));
                }
                Pin::new(leg).poll_frame(cx)
            }
            Kind::Usage(rewrite) => Pin::new(&mut **rewrite).poll_frame(cx),
            Kind::Paired { leg, other } => {
                if let Some(task) = other
                    && let Poll::Ready(ended) = Pin::new(task).poll(cx)
                {
                    *other = None;
                    match ended {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return Poll::Ready(Some(Err(error))),
                        Err(error) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                    }
                }
                Pin::new(leg).poll_frame(cx)
            }
            Kind::Made { events, .. } => {
                let event = std::task::ready!(events.poll_recv(cx));
                Poll::Ready(event.map(|bytes| bytes.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Kind::Leg(leg) | Kind::Paired { leg, .. } => leg.is_end_stream(),
            Kind::After(read, leg) => read.is_empty() && leg.is_end_stream(),
            Kind::Usage(_) | Kind::Made { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            Kind::Leg(leg) | Kind::Paired { leg, .. } => leg.size_hint(),
            Kind::After(..) | Kind::Usage(_) | Kind::Made { .. } => SizeHint::default(),
        }
    }
}
