//! Who is next: a bounded queue in which users take turns.

use std::collections::VecDeque;

/// Things that wait, by user. The user in front has waited longest for a turn.
#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    users: VecDeque<(String, VecDeque<T>)>,
    length: usize,
    max: usize,
    of_one_max: usize,
}

impl<T> FairQueue<T> {
    /// An empty queue of at most `max` things, of one user at most `of_one_max`.
    pub(crate) fn new(max: usize, of_one_max: usize) -> Self {
        Self { users: VecDeque::new(), length: 0, max, of_one_max }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Adds something at the end of a user's own; gives it back when there is no room for it.
    pub(crate) fn push(&mut self, user: &str, thing: T) -> Result<(), T> {
        if self.length >= self.max {
            return Err(thing);
        }
        let at = self.users.iter().position(|(known, _)| known == user).unwrap_or_else(|| {
            self.users.push_back((user.to_owned(), VecDeque::new()));
            self.users.len() - 1
        });
        let own = &mut self.users[at].1;
        if own.len() >= self.of_one_max {
            return Err(thing);
        }
        own.push_back(thing);
        self.length += 1;
        Ok(())
    }

    /// Takes the oldest that `may` be taken of the user whose turn it is; who has more goes to the end of the line.
    pub(crate) fn pop(&mut self, may: impl Fn(&str, &T) -> bool) -> Option<T> {
        let first = |(at, (user, own)): (usize, &(String, VecDeque<T>))| Some((at, own.iter().position(|thing| may(user, thing))?));
        let (at, place) = self.users.iter().enumerate().find_map(first)?;
        let (user, mut own) = self.users.remove(at)?;
        let thing = own.remove(place);
        self.length -= usize::from(thing.is_some());
        if !own.is_empty() {
            self.users.push_back((user, own));
        }
        thing
    }

    /// Whether there is anything that may be taken.
    pub(crate) fn has(&self, may: impl Fn(&str, &T) -> bool) -> bool {
        self.users.iter().any(|(user, own)| own.iter().any(|thing| may(user, thing)))
    }

    /// Lets go of everything that `keep` refuses.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.users.iter_mut().for_each(|(_, own)| own.retain(&mut keep));
        self.users.retain(|(_, own)| !own.is_empty());
        self.length = self.users.iter().map(|(_, own)| own.len()).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_turns_and_keep_their_own_order() {
        let mut queue = FairQueue::new(8, 4);
        for (user, thing) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)] {
            assert_eq!(queue.push(user, thing), Ok(()));
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(|_, _| true)).collect();
        assert_eq!((order, queue.len()), (vec![1, 4, 5, 2, 6, 3], 0));
    }

    #[test]
    fn is_bounded_for_one_and_for_all() {
        let mut queue = FairQueue::new(5, 3);
        let refused: Vec<_> = (0..5).filter_map(|thing| queue.push("a", thing).err()).collect();
        assert_eq!(refused, [3, 4]);
        let refused: Vec<_> = (0..3).filter_map(|thing| queue.push("b", thing).err()).collect();
        assert_eq!(refused, [2]);
        queue.retain(|thing| *thing != 0);
        assert_eq!((queue.len(), queue.pop(|user, _| user != "a"), queue.pop(|_, _| true), queue.len()), (3, Some(1), Some(1), 1));
    }

    #[test]
    fn what_may_not_be_taken_yet_keeps_nobody_waiting_and_its_place() {
        let mut queue = FairQueue::new(8, 4);
        for (user, thing) in [("a", 1), ("a", 2), ("a", 3), ("b", 5), ("b", 4)] {
            assert_eq!(queue.push(user, thing), Ok(()));
        }
        let even = |_: &str, thing: &i32| thing % 2 == 0;
        assert!(queue.has(even));
        assert_eq!([queue.pop(even), queue.pop(even), queue.pop(even)], [Some(2), Some(4), None]);
        assert!(!queue.has(even));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(|_, _| true)).collect();
        assert_eq!(order, [1, 5, 3]);
    }
}
