//! The thread that keeps models as their files are, and brings them from the hub.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::hub::Hub;
use super::hub::follow::follow;
use super::slot::Slot;

/// Looks at the files of all models from time to time, and fetches those of the hub. A thread of its
/// own, because reading a tokenizer takes up to a second and must hold up neither requests nor the pool.
/// Dropping it ends the thread after the model it is reading.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Looks at every slot each `poll`, never without one, and follows those that `hub` is to fill.
    pub(super) fn start(
        slots: Arc<[Arc<Slot>]>,
        poll: Option<Duration>,
        hub: Option<Arc<Hub>>,
    ) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let keep = async move {
            // End with the runtime, right after this.
            for slot in slots.iter() {
                if let (Some(hub), Some(repo)) = (&hub, slot.repo()) {
                    let (slot, hub, repo) = (Arc::clone(slot), Arc::clone(hub), repo.clone());
                    tokio::spawn(follow(slot, hub, repo));
                }
            }
            let Some(poll) = poll else {
                return stopped.cancelled().await;
            };
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
