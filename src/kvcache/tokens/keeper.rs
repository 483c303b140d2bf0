//! The thread that keeps models as their files are.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::slot::Slot;

/// Looks at the files of all models from time to time. A thread of its own, because reading a
/// tokenizer takes up to a second and must hold up neither requests nor the pool. Dropping it ends the
/// thread after the model it is reading.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Looks at every slot each `poll`.
    pub(super) fn start(slots: Arc<[Arc<Slot>]>, poll: Duration) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let keep = async move {
            while stopped
                .run_until_cancelled(tokio::time::sleep(poll))
                .await
                .is_some()
            {
                slots.iter().for_each(|slot| slot.check());
            }
        };
        let thread = std::thread::Builder::new()
            .name("tokenizer-files".to_owned())
            .spawn(move || runtime.block_on(keep))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
