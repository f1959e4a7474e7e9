// All clients at the same time follow three streams each:
//   task: 150 steps; nobody closes it, and the requests of the 45 s after its end are counted
//   large: a result of 63,000 bytes, in the midst of which the connection is cut; closed at connection_close
//   page: two tasks of 150 steps; closed when both have ended
// Meanwhile every connection is cut once, and the gateway is stopped and killed, and each time started again.
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { clients } from './clients.mjs';

if (!isMainThread) {
  const open = await clients[workerData]();
  let close;
  parentPort.on('message', (url) => {
    if (url) close = open(url, (name, id, data) => parentPort.postMessage({ name, id, data }));
    else close();
  });
  parentPort.postMessage('ready');
} else await main();

async function main() {
  const [GATEWAY, BACKEND, STEPS] = [18471, 18472, 150];
  const sidecast = (args, env) => spawn('./sidecast', args, { env: { ...env, LOG_LEVEL: 'error' }, stdio: 'ignore' });
  const startGateway = () => sidecast(['gateway'], { HOST: '127.0.0.1', PORT: `${GATEWAY}`, RETRY_MILLISECONDS: '200',
    CALLBACK_URL: `http://127.0.0.1:${BACKEND}/api/sse/callback?secret=clients` });
  const backend = sidecast([], { ADDR: `127.0.0.1:${BACKEND}`, SSE_GATEWAY_URL: `http://127.0.0.1:${GATEWAY}`,
    SSE_CALLBACK_SECRET: 'clients', TASK_MAX_WORKERS: '200' });
  let gateway = startGateway();
  process.on('exit', () => { backend.kill(); gateway.kill(); });
  const post = async (path, body) => {
    const answer = await fetch(`http://127.0.0.1:${BACKEND}/api/tasks${path}`,
      { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
    return answer.json();
  };
  const startAgain = async (signal) => {
    const ended = once(gateway, 'exit');
    gateway.kill(signal);
    await ended;
    await sleep(300);
    gateway = startGateway();
  };

  const sockets = new Set(); // of all proxies

  // A client's stream has a thread, and a proxy that counts requests (not connections: a client may use one again) and
  // cuts one connection after so many bytes.
  class Stream {
    events = [];
    requests = 0;
    constructor(client) {
      this.worker = new Worker(new URL(import.meta.url), { workerData: client, stdout: true, stderr: true });
      this.worker.on('error', (err) => console.log(`${client}: ${err}`));
      this.ready = once(this.worker, 'message');
    }
    async open(path, cut = Infinity) {
      this.worker.on('message', (event) => this.events.push(event));
      const proxy = net.createServer((client) => {
        const server = net.connect(GATEWAY, '127.0.0.1');
        for (const [from, to] of [[client, server], [server, client]]) {
          sockets.add(from);
          from.on('error', () => to.destroy()).on('end', () => to.end());
          from.on('close', () => { sockets.delete(from); to.destroy(); });
        }
        client.on('data', (piece) => {
          this.requests += piece.toString('latin1').split('GET /').length - 1;
          server.write(piece);
        });
        server.on('data', (piece) => {
          client.write(piece.subarray(0, cut));
          cut -= piece.length;
          if (cut > 0) return;
          cut = Infinity;
          server.pause();
          setTimeout(() => client.destroy(), 100);
        });
      }).listen(0, '127.0.0.1');
      await once(proxy, 'listening');
      this.worker.postMessage(`http://127.0.0.1:${proxy.address().port}${path}`);
    }
    async got(name) {
      while (!this.events.some((e) => e.name === name)) await once(this.worker, 'message');
    }
    close() {
      this.worker.postMessage('');
      this.requests = 0;
    }
    eachOnce({ task_id }) {
      const all = ['task_started', ...Array.from({ length: STEPS }, (_, i) => (i + 1) / STEPS), 'task_completed'];
      const got = this.events.filter((e) => e.name === 'task_event').map((e) => JSON.parse(e.data))
        .filter((e) => e.task_id === task_id).map((e) => e.data?.value ?? e.event_type);
      return `${got}` === `${all}` ? 'yes' : `${got.length} of ${all.length}`;
    }
  }

  const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(clients);
  const rows = names.map((name) => ({ name, task: new Stream(name), large: new Stream(name), page: new Stream(name) }));
  await Promise.all(rows.flatMap(({ task, large, page }) => [task.ready, large.ready, page.ready]));
  await Promise.all(rows.map(async (row) => {
    const demo = () => post('', { type: 'demo', params: { steps: STEPS, delay: 0.1 } });
    row.one = await demo();
    row.two = [await demo(), await demo()];
    row.external = await post('', { type: 'external', params: {} });
    row.task.open(row.one.stream_url);
    row.large.open(row.external.stream_url, 30_000);
    const ids = row.two.map(({ task_id }) => `task_id=${task_id}`).join('&');
    row.page.open(`/api/sse/stream?request_id=${randomUUID()}&${ids}`);
    row.task.got('connection_close').then(() => { row.task.requests = 0; });
    row.large.got('connection_close').then(() => row.large.close());
    await Promise.all([row.task, row.large, row.page].map((stream) => stream.got('connection_open')));
  }));
  await sleep(500);
  for (const socket of sockets) socket.destroy();
  await sleep(1000);
  await startAgain('SIGTERM');
  await sleep(1500);
  await startAgain('SIGKILL');
  await sleep(5000);
  await Promise.all(rows.map(({ external }) => post(`/${external.task_id}/complete`, { result: 'x'.repeat(62_990) })));
  await sleep(10_000);
  for (const { page } of rows) page.close();
  await sleep(45_000);
  console.log('client | version | each once | results | page stream | requests after the end | after close()');
  for (const { name, task, large, page, one, two } of rows) {
    const folder = name.split(' ')[0];
    const version = folder === 'curl' ? '' : JSON.parse(readFileSync(`node_modules/${folder}/package.json`)).version;
    const results = large.events.filter((e) => e.data.includes('x'.repeat(62_990))).length;
    const ended = (stream) => stream.events.some((e) => e.name === 'connection_close');
    console.log([name, version, task.eachOnce(one), results, two.map((task) => page.eachOnce(task)),
      ended(task) ? task.requests : '-', ended(large) ? large.requests + page.requests : '-'].join(' | '));
  }
  process.exit();
}
