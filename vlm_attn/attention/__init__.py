"""The attention engine: registered attention functions, exact rows on demand, segment algebra."""
