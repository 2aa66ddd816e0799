"""From a prompt's tokens to text: sequences in the engine, their detokenizing, stopping, limits and counts. Knows no API's field names."""
