"""A search for the weights, densities and lambda of a merge, by a score of one's own."""


class SearchError(Exception):
    """The search cannot go on; the message is one sentence for the user."""
