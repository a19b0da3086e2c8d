"""An HTTP server that speaks OpenAI's chat completions, over the scheduler (extra ``serve``)."""
