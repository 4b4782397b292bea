"""A stand-in for a server of OpenAI's chat completions: it answers as it is told, and keeps what it is asked."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-stand-in-8c1f5a"  # of whoever asks


class StandIn:
    """
    Attributes:
        url: to be OPENAI_BASE_URL.
        answers: what is said to each question in turn, the last one again and again: a text; a status and what the body
            says; or a function of the question that gives one of both.
        asked: the questions, their headers in small letters under "headers".
    """

    def __init__(self, url, answers):
        self.url, self.answers, self.asked = url, list(answers), []
        self.models = ["only-model"]

    def next(self, question):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer = answer(question) if callable(answer) else answer
        return answer if isinstance(answer, tuple) else (200, answer)

    @property
    def said(self):
        """The last message of each question; of one with pictures its text."""
        contents = [question["messages"][-1]["content"] for question in self.asked]
        return [content if isinstance(content, str) else content[0]["text"] for content in contents]


def refuses_pictures(status):
    """An answer that only a question without pictures gets."""

    def answer(question):
        if isinstance(question["messages"][-1]["content"], list):
            return status, {"error": {"message": "this model takes no image input"}}
        return "A cat sits on a chair."

    return answer


@contextlib.contextmanager
def stand_in(*answers):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.asked.append(
                {
                    **question,
                    "headers": {name.lower(): value for name, value in self.headers.items()},
                    "path": self.path,
                }
            )
            status, body = found.next(question)
            if status == 200:
                message = {"role": "assistant", "content": body}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": question["model"]} | {
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]
                }
            self.reply(status, body)

        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in found.models]})

        def reply(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = StandIn(f"http://127.0.0.1:{server.server_port}/v1", answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
