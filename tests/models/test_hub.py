"""Models pushed to a local stand-in of a hub, which keeps what it is sent."""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest

from ubmoe.config import HubSection, UserError, load_config
from ubmoe.models import cards, hub


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that a push makes; names with `closed` are refused."""

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "closed" in self.path or b"closed" in body[:200]:
            return self.answer({"error": "You are not of this organisation"}, 403)
        if self.path.endswith("/api/repos/create"):
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            secret = given.get("visibility") == "private" or given.get("private") is True
            self.server.private[name] = secret
            return self.answer({"url": f"{self.server.url}/{name}", "name": name})
        if self.path.endswith("/api/validate-yaml"):
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        kept = self.server.repositories.setdefault(name, {})
        for line in lines:
            if line["key"] == "file":
                kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1"}
        return self.answer(commit | {"success": True, "hookOutput": ""})

    def answer(self, body, status=200):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    actual = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    actual.repositories, actual.private = {}, {}
    actual.url = f"http://127.0.0.1:{actual.server_port}"
    Thread(target=actual.serve_forever, daemon=True).start()
    yield actual
    actual.shutdown()
    actual.server_close()


def folder(path, name):
    made = path / name
    (made / "bi").mkdir(parents=True)
    cards.write(made, {"library_name": "transformers"}, f"{cards.START}\n    vllm serve . --x\n")
    (made / "bi" / "adapter_config.json").write_text('{"base_model_name_or_path": null, "r": 2}')
    (made / "model.safetensors").write_bytes(b"weights")
    (made / ".ubmoe").write_text("ours")
    return made


@pytest.mark.enable_socket
def test_folders_are_pushed_with_cards_that_run_there(tmp_path, server):
    folders = [folder(tmp_path, "bi"), folder(tmp_path, "adapter")]
    hub.push(HubSection(push="org/name"), folders, server.url)
    assert server.private == {"org/name": True, "org/name-adapter": True}
    kept = server.repositories["org/name-adapter"]
    assert set(kept) == {"README.md", "bi/adapter_config.json", "model.safetensors"}
    assert kept["model.safetensors"] == b"weights"
    said = kept["README.md"].decode()
    assert 'snapshot_download("org/name-adapter")' in said.replace("'", '"')
    assert "vllm serve org/name-adapter --x" in said
    adapter = json.loads(kept["bi/adapter_config.json"])
    assert adapter == {"base_model_name_or_path": "org/name-adapter", "r": 2}
    assert "directory = " in (folders[1] / "README.md").read_text()  # ours stays as it was
    hub.push(HubSection(push="org/open", private=False), folders[:1], server.url)
    assert server.private["org/open"] is False


@pytest.mark.enable_socket
def test_a_hub_that_refuses_is_one_line(tmp_path, server):
    made = folder(tmp_path, "bi")
    with pytest.raises(UserError, match="^hub.push: .*bi cannot be put into org/closed .*login"):
        hub.push(HubSection(push="org/closed"), [made], server.url)
    assert (made / "model.safetensors").is_file()


def test_nothing_is_pushed_unless_it_is_asked_for(tmp_path):
    hub.push(HubSection(), [folder(tmp_path, "bi")], "http://127.0.0.1:9")
    for name in ("name", "../name", "org/.."):
        with pytest.raises(UserError, match=f"hub.push: got '{re.escape(name)}', expected org/n"):
            load_config(None, [f"hub.push={name}"])
