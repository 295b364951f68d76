"""Runs an API graph on a ComfyUI server and fetches its files: python client.py GRAPH.json [SERVER] [FOLDER]"""

import json
import sys
import uuid
from pathlib import Path

import httpx
from websockets.sync.client import connect

graph = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
server = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:8188"
folder = Path(sys.argv[3] if len(sys.argv) > 3 else "results")
client, me = httpx.Client(base_url=f"http://{server}", timeout=300), str(uuid.uuid4())

with connect(f"ws://{server}/ws?clientId={me}", max_size=None) as events:  # before queueing, so that nothing is missed
    answer = client.post("/prompt", json={"prompt": graph, "client_id": me}).json()
    if "prompt_id" not in answer or answer["node_errors"]:
        sys.exit(f"refused: {json.dumps(answer.get('node_errors') or answer['error'], indent=1)}")
    for event in events:
        if isinstance(event, bytes):  # a preview picture
            continue
        kind, data = (event := json.loads(event))["type"], event["data"]
        if data.get("prompt_id") != answer["prompt_id"]:
            continue
        if kind == "executing":
            if data["node"] is None:  # the end: results are in the history now
                break
            print(f"\n{data['node']} ({graph[data['node']]['class_type']})", end="", flush=True)
        elif kind == "progress":
            print(f"\r{data['node']}: {data['value']}/{data['max']}", end="    ", flush=True)
        elif kind in ("execution_error", "execution_interrupted"):
            sys.exit(f"\n{data['node_id']}: {data.get('exception_message', 'interrupted').strip()}")

folder.mkdir(parents=True, exist_ok=True)
for outputs in client.get(f"/history/{answer['prompt_id']}").json()[answer["prompt_id"]]["outputs"].values():
    for item in (i for values in outputs.values() for i in values if isinstance(i, dict) and "filename" in i):
        with client.stream("GET", "/view", params=item) as reply, (folder / Path(item["filename"]).name).open("wb") as file:
            reply.raise_for_status()
            file.writelines(reply.iter_bytes())
            print(f"\n{file.name}", end="", flush=True)
print()
