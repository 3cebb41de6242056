"""What both sides of the process that opens documents know about their size."""

MAX_PAGES = 20_000
MAX_TEXT_BYTES = 2**20  # of a page's text layer in UTF-8; more is cut
