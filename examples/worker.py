# A whole worker: Python 3, standard library only. python3 examples/worker.py
import json, os, time, urllib.request

def post(path, body):
    url = os.environ.get("API", "http://localhost:8080") + "/api/tasks" + path
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ.get("API_TOKEN", "")}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)

task = post("", {"type": "external", "params": {"title": "import"}})
print(task["stream_url"], flush=True)
for i in 2, 4, 6, 8:
    time.sleep(1)
    post(f"/{task['task_id']}/progress", {"text": f"{i} of 10 files", "value": i / 10})
post(f"/{task['task_id']}/complete", {"result": {"rows": 1200}})
