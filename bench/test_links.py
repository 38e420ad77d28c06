"""How much of a link was used."""

import unittest

import links


class Utilisation(unittest.TestCase):
    def test_a_second_of_the_link_is_all_of_it(self):
        self.assertEqual(links.utilisation(links.LINK, 1.0), 1.0)
        self.assertEqual(links.utilisation(links.LINK, 4.0), 0.25)


if __name__ == "__main__":
    unittest.main()
