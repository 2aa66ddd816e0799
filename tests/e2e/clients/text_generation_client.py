"""TGI's own client: whole and streamed, with details."""

from text_generation import Client
from text_generation.errors import ValidationError

from tests.e2e.clients.arguments import read, report

given = read()
client = Client(f"{given.url}/tgi/{given.model}", timeout=120)
whole = client.generate(given.prompt, max_new_tokens=given.num_tokens)
events = list(client.generate_stream(given.prompt, max_new_tokens=given.num_tokens))
refusal = ""
try:
    client.generate(given.prompt, max_new_tokens=1_000_000)
except ValidationError as error:
    refusal = str(error)
report(
    whole=whole.generated_text,
    num_tokens=whole.details.generated_tokens,
    streamed=events[-1].generated_text,
    num_events=len(events),
    refusal=refusal,
)
