//! Records that somebody else's death left behind.

use super::*;

const QUEUES: u16 = 2;
const SIZE: u16 = 8;

/// A record with the file that it is in, which can be taken over as often as one likes.
struct Kept {
    told: VhostUserInflight,
    file: File,
}

impl Kept {
    fn new() -> Self {
        let (told, file) = Inflight::create(QUEUES, SIZE, true).unwrap();
        Self { told, file }
    }

    fn adopt(&self) -> Inflight {
        Inflight::adopt(&self.told, self.file.try_clone().unwrap()).unwrap()
    }

    fn record(&self) -> Record {
        self.adopt().of_queue(1, SIZE).unwrap()
    }
}

#[test]
fn what_was_taken_and_not_answered_is_found_again_in_its_order() {
    let kept = Kept::new();
    let mut record = kept.record();
    assert_eq!(record.recover(7).unwrap(), None);
    for head in [5, 0, 3, 1] {
        record.take(head);
    }
    record.answering(0);
    record.answered(0, 8);
    record.take(0);
    assert_eq!(kept.record().recover(8).unwrap(), Some(vec![5, 3, 1, 0]));
    // Counting goes on where it stopped.
    let mut record = kept.record();
    record.recover(8).unwrap();
    record.take(2);
    assert_eq!(kept.record().recover(8).unwrap(), Some(vec![5, 3, 1, 0, 2]));
    // The other queue knows nothing of it.
    assert_eq!(kept.adopt().of_queue(0, SIZE).unwrap().recover(0).unwrap(), None);
}

#[test]
fn a_kill_at_any_point_of_an_answer_neither_loses_nor_doubles_it() {
    let kept = Kept::new();
    let mut record = kept.record();
    record.recover(u16::MAX).unwrap();
    record.take(4);
    record.take(6);
    record.answering(6);
    assert_eq!(kept.record().recover(u16::MAX).unwrap(), Some(vec![4, 6]), "not published yet");
    assert_eq!(kept.record().recover(0).unwrap(), Some(vec![4]), "published");
    let record = kept.record();
    record.answering(4);
    record.answered(4, 1);
    assert_eq!(kept.record().recover(1).unwrap(), Some(vec![]));
}

#[test]
fn several_answers_that_were_published_at_once_are_all_taken_back() {
    // Another program may publish in batches.
    let kept = Kept::new();
    let mut record = kept.record();
    record.recover(0).unwrap();
    for head in [1, 2, 3] {
        record.take(head);
    }
    record.answering(1);
    record.answering(3);
    assert_eq!(kept.record().recover(2).unwrap(), Some(vec![2]));
}

#[test]
fn a_record_that_contradicts_itself_is_refused() {
    let kept = Kept::new();
    let mut record = kept.record();
    record.recover(0).unwrap();
    assert!(kept.record().recover(SIZE + 1).is_err(), "more answers than there is room for");
    record.store(HEADER_LAST_HEAD, SIZE);
    assert!(kept.record().recover(1).is_err(), "a descriptor that isn't there");
    record.store(HEADER_LAST_HEAD, 0u16);
    record.store(HEADER_COUNT, SIZE - 1);
    record.take(3);
    assert!(kept.record().recover(0).is_err(), "of another size, and not empty");
    record.answered(3, 5);
    assert_eq!(kept.record().recover(7).unwrap(), None, "of another size: begun anew");
    record.store(HEADER_COUNT, SIZE);
    record.store(HEADER_VERSION, VERSION + 1);
    assert!(kept.record().recover(0).is_err());
    assert!(kept.adopt().of_queue(QUEUES, SIZE).is_none());
    assert!(kept.adopt().of_queue(0, SIZE + 1).is_none());
    let small = VhostUserInflight { mmap_size: 64, ..kept.told };
    assert!(Inflight::adopt(&small, kept.file.try_clone().unwrap()).is_err());
}

#[test]
fn the_cache_mode_is_kept_where_it_was_made_by_us() {
    let kept = Kept::new();
    assert_eq!(kept.adopt().remembered_wce(), Some(true));
    kept.adopt().remember_wce(false);
    assert_eq!(kept.adopt().remembered_wce(), Some(false));
    let foreign = VhostUserInflight { mmap_size: kept.told.mmap_size - UNIT as u64, ..kept.told };
    let foreign = Inflight::adopt(&foreign, kept.file.try_clone().unwrap()).unwrap();
    foreign.remember_wce(true);
    assert_eq!(foreign.remembered_wce(), None);
    assert_eq!(kept.adopt().remembered_wce(), Some(false));
}
