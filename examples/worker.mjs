// A whole worker: Node.js 18 or later, without packages. node examples/worker.mjs
import { setTimeout as sleep } from "node:timers/promises";

async function post(path, body) {
  const url = (process.env.API ?? "http://localhost:8080") + "/api/tasks" + path;
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${process.env.API_TOKEN ?? ""}` };
  const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

const { task_id, stream_url } = await post("", { type: "external", params: { title: "import" } });
console.log(stream_url);
for (const i of [2, 4, 6, 8]) {
  await sleep(1000);
  await post(`/${task_id}/progress`, { text: `${i} of 10 files`, value: i / 10 });
}
await post(`/${task_id}/complete`, { result: { rows: 1200 } });
