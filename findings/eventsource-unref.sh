#!/usr/bin/env bash
# A Node.js program that does nothing but listen to an EventSource of eventsource 5.1.5 or of undici 7.30.2 ends, with
# exit code 0 and not a word, when its connection ends for the first time: the timer for the next try does not hold the
# process, and nothing else does. With eventsource 4.1.1 and 2.0.2 it goes on. A setInterval beside it helps.
#
# Seen: eventsource 5.1.5 and undici 7.30.2 have made 1 request when the process ends with 0; 4.1.1 and 2.0.2 make
# about 20 until they are killed after 10 s.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es5@npm:eventsource@5.1.5 es4@npm:eventsource@4.1.1 \
  es2@npm:eventsource@2.0.2 undici@7.30.2
cat >server.mjs <<'J'
import http from 'node:http';
import { writeFileSync } from 'node:fs';
const requests = {};
const server = http.createServer((request, response) => {
  if (request.url === '/requests') return response.end(JSON.stringify(requests));
  requests[request.url] = (requests[request.url] ?? 0) + 1;
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.end('retry: 300\ndata: 1\n\n');
}).listen(0, '127.0.0.1', () => writeFileSync('port', `${server.address().port}`));
J
cat >client.mjs <<'J'
import { readFileSync } from 'node:fs';
const m = await import(process.argv[2]);
const EventSource = m.EventSource ?? m.default;
new EventSource(`http://127.0.0.1:${readFileSync('port')}/${process.argv[2]}`);
J
node server.mjs &
until [ -s port ]; do sleep .1; done
for client in es2 es4 es5 undici; do
  code=0
  timeout 10 node --no-warnings client.mjs $client || code=$?
  echo "$client: exit code $code"
done | tee codes
[ "$(tr '\n' ' ' <codes)" = "es2: exit code 124 es4: exit code 124 es5: exit code 0 undici: exit code 0 " ]
cat >requests.mjs <<'J'
import { readFileSync } from 'node:fs';
const requests = await (await fetch(`http://127.0.0.1:${readFileSync('port')}/requests`)).json();
console.log('requests:', requests);
const { '/es2': es2, '/es4': es4, '/es5': es5, '/undici': undici } = requests;
process.exit(es2 > 3 && es4 > 3 && es5 === 1 && undici === 1 ? 0 : 1);
J
node requests.mjs
