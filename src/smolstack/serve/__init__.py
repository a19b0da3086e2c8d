"""An HTTP server for OpenAI's API, built on the engine (extra ``serve``)."""
