//! When and whether a packet leaves: no clock, no randomness, no system calls.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use crate::options::{LineOptions, PPM};

const NS_PER_SECOND: u64 = 1_000_000_000;

/// One direction of a node's line: sends one packet after the other, from a drop-tail queue.
#[derive(Clone)]
struct Line {
    bits_per_second: u64,
    queue_ns: u64, // how long a full queue takes to send, what is being sent included
    free_at_ns: u64,
}

impl Line {
    fn new(bits_per_second: u64, queue_bytes: u64) -> Self {
        Self { bits_per_second, queue_ns: sending_ns(queue_bytes, bits_per_second), free_at_ns: 0 }
    }

    /// Returns when the last bit of a packet that comes at `now_ns` has left, or nothing if the packet finds no room.
    fn admit(&mut self, now_ns: u64, packet_bytes: usize) -> Option<u64> {
        let sent_at_ns = self.free_at_ns.max(now_ns) + sending_ns(packet_bytes as u64, self.bits_per_second);
        if sent_at_ns - now_ns > self.queue_ns {
            return None;
        }
        self.free_at_ns = sent_at_ns;
        Some(sent_at_ns)
    }
}

fn sending_ns(bytes: u64, bits_per_second: u64) -> u64 {
    bytes * 8 * NS_PER_SECOND / bits_per_second // the largest queue, a GB, is 8e18: fits
}

/// A packet between two nodes.
#[derive(Debug, PartialEq)]
pub(crate) struct Packet {
    pub(crate) source: usize,
    pub(crate) destination: usize,
    pub(crate) bytes: Vec<u8>,
}

/// The next step of a packet under way.
enum Step {
    EnterDownlink(Packet),
    Arrive(Packet),
}

/// What became of packets.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Counts {
    delivered: u64,
    lost: u64,
    refused_up: u64,
    refused_down: u64,
}

impl Display for Counts {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delivered, lost, refused_up, refused_down } = self;
        write!(out, "{delivered} packets delivered, {lost} lost, {refused_up} dropped by full uplinks, {refused_down} by full downlinks")
    }
}

/// All lines, and the packets between them. It holds no more than fits the queues and what the rate puts into the delay.
pub(crate) struct Star {
    uplinks: Vec<Line>,
    downlinks: Vec<Line>,
    delay_ns: u64,
    loss_ppm: u64,
    steps: BTreeMap<(u64, u64), Step>, // by time, then in the order of their making
    steps_made: u64,
    pub(crate) counts: Counts,
}

impl Star {
    pub(crate) fn new(nodes: usize, options: &LineOptions) -> Self {
        let line = Line::new((options.rate_mbit * 1e6) as u64, options.queue_kb * 1000);
        Self {
            uplinks: vec![line.clone(); nodes],
            downlinks: vec![line; nodes],
            delay_ns: (options.delay_ms * 1e6) as u64,
            loss_ppm: options.loss_ppm,
            steps: BTreeMap::new(),
            steps_made: 0,
            counts: Counts::default(),
        }
    }

    /// Takes a packet from its source. `draw_ppm` is evenly distributed below a million; a lost packet has used its uplink.
    pub(crate) fn send(&mut self, now_ns: u64, draw_ppm: u64, packet: Packet) {
        match self.uplinks[packet.source].admit(now_ns, packet.bytes.len()) {
            None => self.counts.refused_up += 1,
            Some(_) if draw_ppm < self.loss_ppm => self.counts.lost += 1,
            Some(sent_at_ns) => self.schedule(sent_at_ns + self.delay_ns, Step::EnterDownlink(packet)),
        }
    }

    /// Returns the next packet that has arrived by `now_ns`.
    pub(crate) fn next_arrived(&mut self, now_ns: u64) -> Option<Packet> {
        while let Some(entry) = self.steps.first_entry().filter(|entry| entry.key().0 <= now_ns) {
            // The downlink is entered when that was due, not when we came to it: lateness does not add up.
            let ((due_ns, _), step) = entry.remove_entry();
            match step {
                Step::EnterDownlink(packet) => match self.downlinks[packet.destination].admit(due_ns, packet.bytes.len()) {
                    None => self.counts.refused_down += 1,
                    Some(sent_at_ns) => self.schedule(sent_at_ns, Step::Arrive(packet)),
                },
                Step::Arrive(packet) => {
                    self.counts.delivered += 1;
                    return Some(packet);
                }
            }
        }
        None
    }

    /// Returns when `next_arrived` has something to do.
    pub(crate) fn next_due_ns(&self) -> Option<u64> {
        self.steps.first_key_value().map(|((due_ns, _), _)| *due_ns)
    }

    fn schedule(&mut self, due_ns: u64, step: Step) {
        self.steps.insert((due_ns, self.steps_made), step);
        self.steps_made += 1;
    }
}

/// Returns which node an IPv4 packet is for; nothing for all that the star does not carry.
pub(crate) fn destination(packet: &[u8], nodes: usize) -> Option<usize> {
    let is_ipv4 = packet.first()? >> 4 == 4;
    match packet.get(16..20)? {
        [10, 88, 0, host] if is_ipv4 => usize::from(*host).checked_sub(1).filter(|node| *node < nodes),
        _ => None,
    }
}

/// Pseudo-random numbers (`SplitMix64`), the same in each run.
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn next_ppm(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % PPM
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000; // in ns

    // At 8 Mbit/s a byte takes 1 microsecond, and a packet of 1000 bytes 1 ms.
    fn star(nodes: usize, delay_ms: f64, loss_ppm: u64, queue_kb: u64) -> Star {
        Star::new(nodes, &LineOptions { rate_mbit: 8.0, delay_ms, loss_ppm, queue_kb })
    }

    fn packet(source: usize, destination: usize) -> Packet {
        Packet { source, destination, bytes: vec![0; 1000] }
    }

    /// Returns from whom and when packets arrive.
    fn arrivals(star: &mut Star) -> Vec<(usize, u64)> {
        let mut arrived = Vec::new();
        while let Some(due_ns) = star.next_due_ns() {
            arrived.extend(std::iter::from_fn(|| star.next_arrived(due_ns)).map(|packet| (packet.source, due_ns)));
        }
        arrived
    }

    #[test]
    fn packet_takes_uplink_delay_and_downlink_and_not_a_nanosecond_less() {
        let mut star = star(2, 20.0, 0, 10);
        star.send(5 * MS, 0, packet(0, 1));
        assert_eq!(star.next_arrived(27 * MS - 1), None);
        assert_eq!(star.next_arrived(27 * MS), Some(packet(0, 1)));
        assert_eq!(star.next_due_ns(), None);
    }

    #[test]
    fn packets_of_one_sender_leave_in_order_at_its_rate() {
        let mut star = star(3, 0.0, 0, 10);
        [1, 2, 1].into_iter().for_each(|destination| star.send(0, 0, packet(0, destination)));
        assert_eq!(arrivals(&mut star), [(0, 2 * MS), (0, 3 * MS), (0, 4 * MS)]);
    }

    #[test]
    fn idle_line_saves_nothing_up() {
        let mut line = Line::new(8_000_000, 10_000);
        assert_eq!(line.admit(0, 1000), Some(MS));
        assert_eq!(line.admit(50 * MS, 1000), Some(51 * MS));
        assert_eq!(line.admit(50 * MS, 1000), Some(52 * MS));
    }

    #[test]
    fn queue_takes_what_fits_and_not_a_byte_more() {
        let mut line = Line::new(8_000_000, 3000);
        assert_eq!(line.admit(0, 1999), Some(1_999_000));
        assert_eq!(line.admit(0, 1002), None);
        assert_eq!(line.admit(0, 1001), Some(3 * MS));
        assert_eq!(line.admit(MS - 1, 1000), None);
        assert_eq!(line.admit(MS, 1000), Some(4 * MS));
    }

    #[test]
    fn senders_share_the_line_of_their_receiver() {
        let mut star = star(3, 10.0, 0, 10);
        star.send(0, 0, packet(0, 2));
        star.send(0, 0, packet(1, 2));
        assert_eq!(arrivals(&mut star), [(0, 12 * MS), (1, 13 * MS)]);
    }

    #[test]
    fn full_downlink_drops_and_says_so() {
        let mut star = star(4, 10.0, 0, 2);
        (0..3).for_each(|source| star.send(0, 0, packet(source, 3)));
        assert_eq!(arrivals(&mut star), [(0, 12 * MS), (1, 13 * MS)]);
        assert_eq!(star.counts, Counts { delivered: 2, refused_down: 1, ..Counts::default() });
    }

    #[test]
    fn one_senders_queue_does_not_hold_up_anothers_packet() {
        let mut star = star(3, 10.0, 0, 10);
        (0..5).for_each(|_| star.send(0, 0, packet(0, 2)));
        star.send(MS / 2, 0, packet(1, 2));
        assert_eq!(arrivals(&mut star)[..3], [(0, 12 * MS), (1, 13 * MS), (0, 14 * MS)]);
    }

    #[test]
    fn loses_by_the_draw_after_the_uplink() {
        let mut star = star(2, 0.0, 1000, 10);
        star.send(0, 999, packet(0, 1));
        star.send(0, 1000, packet(0, 1));
        assert_eq!(arrivals(&mut star), [(0, 3 * MS)]);
        assert_eq!(star.counts, Counts { delivered: 1, lost: 1, ..Counts::default() });
    }

    #[test]
    fn draws_below_the_loss_come_as_often_as_asked() {
        let mut draws = Draws(1);
        let lost = (0..1_000_000).filter(|_| draws.next_ppm() < 1000).count();
        assert!((900..1100).contains(&lost), "{lost}"); // 1000 expected, and this is three deviations
    }

    #[test]
    fn lateness_of_the_caller_does_not_add_up() {
        let mut star = star(2, 10.0, 0, 10);
        star.send(0, 0, packet(0, 1));
        star.send(0, 0, packet(0, 1));
        assert!(star.next_arrived(13 * MS).is_some(), "due at 12 ms");
        assert!(star.next_arrived(13 * MS).is_some(), "due at 13 ms, though the first was asked for late");
    }

    #[test]
    fn carries_ipv4_between_nodes_only() {
        let to = |address: [u8; 4]| [&[0x45][..], &[0; 15], &address, b"data"].concat();
        assert_eq!(destination(&to([10, 88, 0, 1]), 3), Some(0));
        assert_eq!(destination(&to([10, 88, 0, 3]), 3), Some(2));
        for elsewhere in [[10, 88, 0, 0], [10, 88, 0, 4], [10, 88, 0, 255], [10, 88, 1, 1], [224, 0, 0, 251]] {
            assert_eq!(destination(&to(elsewhere), 3), None, "{elsewhere:?}");
        }
        let mut ipv6 = to([10, 88, 0, 1]);
        ipv6[0] = 0x60;
        assert_eq!(destination(&ipv6, 3), None);
        assert_eq!(destination(&to([10, 88, 0, 1])[..19], 3), None);
        assert_eq!(destination(&[], 3), None);
    }
}
