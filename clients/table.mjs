// Each client follows a task of 30 steps through a small TCP proxy. The proxy cuts its connections once, then the
// gateway is killed and started again. Another task has a result of 63,000 bytes. One line says what the client got.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';

const [PUBLIC, GATEWAY, BACKEND] = [18470, 18471, 18472];
const sidecast = (args, env) => spawn('./sidecast', args, { env: { ...env, LOG_LEVEL: 'error' }, stdio: ['ignore', 'inherit', 'inherit'] });
const startGateway = () => sidecast(['gateway'], { HOST: '127.0.0.1', PORT: `${GATEWAY}`, RETRY_MILLISECONDS: '200',
  CALLBACK_URL: `http://127.0.0.1:${BACKEND}/api/sse/callback?secret=clients` });
const backend = sidecast([], { ADDR: `127.0.0.1:${BACKEND}`, SSE_GATEWAY_URL: `http://127.0.0.1:${GATEWAY}`,
  SSE_CALLBACK_SECRET: 'clients' });
let gateway = startGateway();
let sockets = new Set(), connections = 0;
net.createServer((client) => {
  connections++;
  const server = net.connect(GATEWAY, '127.0.0.1');
  for (const [from, to] of [[client, server], [server, client]]) {
    sockets.add(from);
    from.pipe(to);
    from.on('error', () => to.destroy()).on('close', () => { sockets.delete(from); to.destroy(); });
  }
}).listen(PUBLIC, '127.0.0.1');

// A client opens a URL, calls got(name, id, data) for each event, and returns a function that ends it.
const standard = (EventSource) => (url, got) => {
  const source = new EventSource(url);
  for (const name of ['connection_open', 'task_event', 'connection_close'])
    source.addEventListener(name, (e) => got(name, e.lastEventId, e.data));
  return () => source.close();
};
const clients = {
  'eventsource': async () => standard((await import('eventsource')).EventSource),
  'eventsource2': async () => standard((await import('eventsource2')).default),
  'eventsource-client': async () => {
    const { createEventSource } = await import('eventsource-client');
    return (url, got) => {
      const source = createEventSource({ url, onMessage: (e) => got(e.event, e.id, e.data) });
      return () => source.close();
    };
  },
  'reconnecting-eventsource': async () => {
    globalThis.EventSource = (await import('eventsource')).EventSource;
    const m = await import('reconnecting-eventsource');
    return standard(m.default.default ?? m.default);
  },
  'curl': async () => (url, got) => {
    const child = spawn('curl', ['-sN', url]);
    let text = '', event = {};
    child.stdout.on('data', (piece) => {
      const lines = (text + piece).split('\n');
      text = lines.pop();
      for (const line of lines) {
        if (line === '') { got(event.event, event.id, event.data); event = {}; }
        const [, field, value] = /^(\w+): (.*)/.exec(line) ?? [];
        if (field) event[field] = value;
      }
    });
    return () => child.kill();
  },
};
const post = async (path, body) => {
  const answer = await fetch(`http://127.0.0.1:${BACKEND}/api/tasks${path}`,
    { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
  return answer.json();
};

async function follow(client, task, trouble, seconds) {
  const events = [], begun = connections;
  const end = client(`http://127.0.0.1:${PUBLIC}${task.stream_url}`, (name, id, data) => events.push({ name, id, data }));
  await trouble();
  for (let i = 0; i < seconds * 10 && !events.some((e) => e.name === 'connection_close'); i++) await sleep(100);
  await sleep(1500);
  const quiet = connections;
  await sleep(1500);
  end();
  return { events: events.filter((e) => e.name === 'task_event'), connections: connections - begun, stops: connections === quiet };
}
async function row(name) {
  const client = await clients[name]();
  const cut = await follow(client, await post('', { type: 'demo', params: { steps: 30, delay: 0.1 } }), async () => {
    await sleep(700);
    for (const socket of sockets) socket.destroy();
    await sleep(800);
    const killed = once(gateway, 'exit');
    gateway.kill('SIGKILL');
    await killed;
    await sleep(300);
    gateway = startGateway();
  }, 12);
  const ids = cut.events.map((e) => +e.id.split('-')[1]);
  const once32 = ids.length === 32 && ids.every((id, i) => id === i + 1);
  const task = await post('', { type: 'external', params: {} });
  const large = await follow(client, task, async () => {
    await sleep(300);
    await post(`/${task.task_id}/complete`, { result: 'x'.repeat(62_990) });
  }, 5);
  const takes = large.events.some((e) => e.data.includes('x'.repeat(62_990)));
  console.log(`${name} | once ${once32} (${ids.length} of 32) | stops ${cut.stops} | 63,000 ${takes} | connections ${cut.connections}`);
}
await sleep(1000);
for (const name of process.argv.length > 2 ? process.argv.slice(2) : Object.keys(clients))
  await row(name).catch((err) => console.log(`${name} | ${err}`));
backend.kill();
gateway.kill();
process.exit();
