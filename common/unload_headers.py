"""Names the headers by which the mesh controls how its runtime unloads a model. Foreign runtimes ignore them."""

GRACE_HEADER = "x-repertory-grace-s"  # "0": the mesh has waited for the model's requests
RETRY_HEADER = "x-repertory-allow-retry"  # "1": an explicit load request, which ends the quarantine of the model
