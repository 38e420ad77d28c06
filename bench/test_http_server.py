"""The HTTP server's answers: whole files, ranges, and ranges beyond the end."""

import unittest

import http_server


class Answers(unittest.TestCase):
    def test_ranges(self):
        head, first, end = http_server.answer("GET", {"range": "bytes=10-19"}, 100)
        self.assertIn("206", head.split("\r\n")[0])
        self.assertIn("Content-Range: bytes 10-19/100\r\n", head)
        self.assertIn("Content-Length: 10\r\n", head)
        self.assertEqual((first, end), (10, 20))

    def test_a_range_beyond_the_end_is_cut_or_refused(self):
        head, first, end = http_server.answer("GET", {"range": "bytes=90-"}, 100)
        self.assertIn("Content-Length: 10\r\n", head)
        self.assertEqual((first, end), (90, 100))
        head, first, end = http_server.answer("GET", {"range": "bytes=100-109"}, 100)
        self.assertIn("416", head.split("\r\n")[0])
        self.assertEqual(first, end)

    def test_head_has_a_length_and_no_body(self):
        head, first, end = http_server.answer("HEAD", {}, 100)
        self.assertIn("Content-Length: 100\r\n", head)
        self.assertEqual(first, end)


class Lines(unittest.TestCase):
    def test_all_connections_share_the_line_and_a_pause_saves_nothing_up(self):
        line = http_server.Line(1000)
        self.assertEqual([line.passes(500, 1.0), line.passes(500, 1.0)], [1.5, 2.0])
        self.assertEqual(line.passes(1000, 100.0), 101.0)


if __name__ == "__main__":
    unittest.main()
