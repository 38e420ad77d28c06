"""What is read out of fio's words, and what is left for the stream."""

import json
import unittest

import guests_first
from guests_first import Latency, Phase


def job(read, write):
    side = {"total_ios": 0, "bw_bytes": 0, "clat_ns": {}}
    some = {"bw_bytes": 4096, "clat_ns": {"percentile": {"50.000000": 80_000, "99.000000": 200_000}}}
    sides = {name: {**side, **(some if count else {}), "total_ios": count} for name, count in (("read", read), ("write", write))}
    return "fio: words\n" + json.dumps({"jobs": [sides]})


class FirstGuests(unittest.TestCase):
    def test_the_side_that_worked_is_read(self):
        for text in (job(7, 0), job(0, 7)):
            self.assertEqual(guests_first.latency_of(text), Latency(80, 200, 4096))

    def test_what_is_left_is_what_the_guest_does_not_take(self):
        phase = Phase(Latency(1, 2, 100), Latency(2, 4, 100), 500, 200)
        self.assertEqual(phase.share, 0.5)
        self.assertEqual(Phase(phase.idle, Latency(2, 4, 600), 500, 200).share, 0)

    def test_a_row_has_ratios_of_the_same_run(self):
        one = Phase(Latency(100, 200, 0), Latency(150, 300, 0), 1000 << 20, 500 << 20)
        row = guests_first.row("reads", "x", [one, one, one])
        self.assertEqual(row, ["reads", "x", "100", "150", "1.50", "200", "300", "1.50", "500", "50%"])


if __name__ == "__main__":
    unittest.main()
