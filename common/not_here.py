"""Names the header of an answer that another copy can give."""

# The copy cannot take the request and has not begun it: the model is not loaded there, or nothing is answered now.
NOT_HERE_HEADER = "x-repertory-not-here"
