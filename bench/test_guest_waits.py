"""How a guest's waiting is told from its machine's trace."""

import unittest

import guest_waits

TRACE = """\
7@100.000000:virtio_blk_handle_read vdev 0x1 req 0xa sector 0 nsectors 1
something else
7@100.250000:virtio_blk_rw_complete vdev 0x1 req 0xa ret 0
7@101.000000:virtio_blk_handle_read vdev 0x1 req 0xa sector 8 nsectors 8
7@101.100000:virtio_blk_handle_read vdev 0x1 req 0xb sector 16 nsectors 8
7@101.300000:virtio_blk_rw_complete vdev 0x1 req 0xa ret 0
7@101.500000:virtio_blk_rw_complete vdev 0x1 req 0xb ret 0
7@102.000000:virtio_blk_rw_complete vdev 0x1 req 0xc ret 0
7@103.000000:virtio_blk_handle_read vdev 0x1 req 0xd sector 16 nsectors 8
""".splitlines()


class Waiting(unittest.TestCase):
    def test_reads_are_paired_and_what_never_began_or_ended_is_left_out(self):
        self.assertEqual([round(end - begin, 6) for begin, end in guest_waits.reads(TRACE)], [0.25, 0.3, 0.4])

    def test_time_in_which_several_are_under_way_counts_once(self):
        self.assertAlmostEqual(guest_waits.waited(guest_waits.reads(TRACE)), 0.75)

    def test_nothing_waits_for_nothing(self):
        self.assertEqual(guest_waits.waited([]), 0.0)


if __name__ == "__main__":
    unittest.main()
