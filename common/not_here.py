"""Names the header of a refusal after which another copy can still answer the request."""

# The copy has not begun the request and cannot take it: the model is not loaded there, or the runtime answers nothing at present.
NOT_HERE_HEADER = "x-repertory-not-here"
