//! What peers say, as it was a moment ago: asked for anew in the background, so that nobody waits for a peer that does not answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::clock::instant;
use tokio::sync::watch;

/// An answer that is not older is better than waiting for a newer one.
const OLD_AGE: Duration = Duration::from_secs(10);
/// How long whoever asks waits otherwise.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// The last answer to a question, and whether it is being asked again.
pub struct Refreshed<T>(Arc<Shared<T>>);

struct Shared<T> {
    last: Mutex<Last<T>>,
    /// How many answers have come.
    came: watch::Sender<u64>,
}

struct Last<T> {
    answer: Option<(Instant, T)>,
    is_asking: bool,
}

impl<T> Default for Refreshed<T> {
    fn default() -> Self {
        Self(Arc::new(Shared { last: Mutex::new(Last { answer: None, is_asking: false }), came: watch::Sender::new(0) }))
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Last<T>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + Send + 'static> Refreshed<T> {
    /// The answer. One that is older than `age_max`, or not `fits`, is asked for again by `ask`; meanwhile the old
    /// one is returned, unless it is very old: then whoever asks waits a moment for the new one.
    pub async fn get(
        &self,
        age_max: Duration,
        fits: impl Fn(&T) -> bool,
        ask: impl Future<Output = Option<T>> + Send + 'static,
    ) -> Option<T> {
        let known = |last: &Last<T>| last.answer.as_ref().filter(|(_, answer)| fits(answer)).cloned();
        let mut came = self.0.came.subscribe();
        {
            let mut last = self.0.lock();
            let before = known(&last);
            let age = before.as_ref().map(|(at, _)| instant() - *at);
            if age.is_some_and(|age| age < age_max) {
                return before.map(|(_, answer)| answer);
            }
            if !last.is_asking {
                last.is_asking = true;
                let shared = Arc::clone(&self.0);
                tokio::spawn(async move {
                    let _done = Done(&shared);
                    if let Some(answer) = ask.await {
                        shared.lock().answer = Some((instant(), answer));
                    }
                });
            }
            if age.is_some_and(|age| age < OLD_AGE) {
                return before.map(|(_, answer)| answer);
            }
        }
        let _ = tokio::time::timeout(WAIT_MAX, came.changed()).await;
        known(&self.0.lock()).map(|(_, answer)| answer)
    }
}

/// The end of an asking, however it comes.
struct Done<'a, T>(&'a Shared<T>);

impl<T> Drop for Done<'_, T> {
    fn drop(&mut self) {
        self.0.lock().is_asking = false;
        self.0.came.send_modify(|answers| *answers += 1);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn nobody_waits_for_what_is_known_and_is_asked_for_again() {
        const LONG: Duration = Duration::from_secs(3600);
        let refreshed = Refreshed::<u32>::default();
        assert_eq!(refreshed.get(LONG, |_| true, async { Some(1) }).await, Some(1));
        assert_eq!(refreshed.get(LONG, |_| true, async { panic!("it is known") }).await, Some(1));
        assert_eq!(refreshed.get(LONG, |answer| *answer == 2, async { Some(2) }).await, Some(2));
        let (answer, slow) = oneshot::channel();
        assert_eq!(refreshed.get(Duration::ZERO, |_| true, async { slow.await.ok() }).await, Some(2), "the last that is known");
        assert_eq!(refreshed.get(Duration::ZERO, |_| true, async { panic!("it is being asked") }).await, Some(2));
        answer.send(3).expect("somebody waits");
        while refreshed.get(LONG, |_| true, async { panic!("it is known") }).await != Some(3) {
            tokio::task::yield_now().await;
        }
        assert_eq!(refreshed.get(LONG, |answer| *answer == 4, async { None }).await, None, "nobody knows");
    }
}
