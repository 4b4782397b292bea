"""Requests to the routes, and what an error of theirs must be."""


def ask(client, **values):
    return client.post("/v1/videos", json={"prompt": "a red circle", **values})


def assert_error(response, status, code, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error["message"]
