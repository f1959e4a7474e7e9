#!/usr/bin/env bash
# The XMLHttpRequest of jsdom 26.1.0 (that of jest-environment-jsdom 30) says nothing when a connection breaks off in
# the midst of a chunked response: no error, load or loadend, readyState stays 3, for ever. A response that ends in
# order, and a connection that breaks before any answer, are told.
#
# Seen: 4 s after the cut no event but readystatechange and progress.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent jsdom@26.1.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { JSDOM } from 'jsdom';
const server = http.createServer(async (request, response) => {
  if (request.url === '/none') return response.destroy();
  response.writeHead(200, { 'Content-Type': 'text/plain' });
  response.write('some text');
  await sleep(500);
  if (request.url === '/end') response.end(); else response.destroy();
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
const { XMLHttpRequest } = new JSDOM('', { url }).window;
const seen = {};
for (const path of ['/none', '/end', '/cut']) {
  const xhr = new XMLHttpRequest();
  for (const name of ['error', 'abort', 'timeout', 'load', 'loadend']) {
    xhr.addEventListener(name, () => { seen[path] = `${seen[path] ?? ''} ${name}`; });
  }
  xhr.open('GET', url + path);
  xhr.send();
  await sleep(4500);
  seen[path] = `${seen[path] ?? ''} (readyState ${xhr.readyState})`.trim();
}
console.log('jsdom 26.1.0:', seen);
process.exit(seen['/none'] === 'error loadend (readyState 4)' && seen['/end'] === 'load loadend (readyState 4)'
  && seen['/cut'] === '(readyState 3)' ? 0 : 1);
J
node run.mjs 2>errors
