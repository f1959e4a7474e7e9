// POST /internal/send: how events come to the gateway. The streams that they go to are in stream.go; who may have one
// is in sidecar.go.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/http"
)

const (
	maxSend  = 1 << 20 // bytes of a body, or of a line of a batch
	maxBatch = 4 << 20 // bytes of a batch
)

// sendRequest is the body of POST /internal/send. With neither an event nor end it asks whether the stream is there.
// Its slices are parts of the body.
type sendRequest struct {
	token []byte
	event sentEvent
	end   bool
}

var errNoToken = badRequest("bad_token", "token is missing or empty")

// parseSend reads a body or a line. It decodes the strings in place.
func parseSend(body []byte) (m sendRequest, err error) {
	if len(body) > maxSend {
		return m, errBodyTooLarge
	}
	var token, end []byte
	var e eventFields
	if err := pick(body, member{"token", &token, nil}, e.field(), member{"close", &end, nil}); err != nil {
		return m, err
	}
	var tokenErr, eventErr, endErr error
	m.token, tokenErr = parseText(token)
	if tokenErr == nil && len(m.token) == 0 {
		tokenErr = errNoToken
	}
	m.event, eventErr = e.parse()
	m.end, endErr = parseBool(end)
	return m, cmp.Or(tokenErr, eventErr, endErr)
}

// serveSend is POST /internal/send.
func (g *gateway) serveSend(w http.ResponseWriter, r *http.Request) {
	uncounted(w)
	mediaType, limit := jsonType, int64(maxSend)
	if hasMediaType(r, ndjson) {
		mediaType, limit = ndjson, maxBatch
	} else if !hasMediaType(r, jsonType) {
		g.met.events.with("invalid").Inc()
		writeError(w, r, errMediaType)
		return
	}
	body, err := readBody(w, r, limit)
	if err != nil {
		g.met.events.with("invalid").Inc()
		writeError(w, r, err)
		return
	}
	status, text := g.answerPlain(nil, plainPost{mediaType: mediaType}, body)
	g.posts.respond(w, r, mediaType, status, text)
}

// plainLimit is for plainPoster.
func (g *gateway) plainLimit(p plainPost) int64 {
	switch {
	case string(p.path) != "/internal/send" || g.life.Err() != nil:
		return -1
	case p.mediaType == ndjson:
		return maxBatch
	}
	return maxSend
}

// answerPlain carries out the body of POST /internal/send, of which it needs the media type. It is also for plainPoster.
func (g *gateway) answerPlain(text []byte, p plainPost, body []byte) (status int, answer []byte) {
	if p.mediaType == ndjson {
		return http.StatusOK, g.answerBatch(text, body)
	}
	status, said := g.take(parseSend(body))
	return status, append(append(text, said...), '\n')
}

// answerBatch carries out the lines of a batch, and appends a line about each to text. Events in a row for the same
// stream are written at once.
func (g *gateway) answerBatch(text, body []byte) []byte {
	b := burst{g: g, buf: chunkBuffers.Get().(*[]byte)}
	defer chunkBuffers.Put(b.buf)
	write := func() {
		if n := b.events; n > 0 {
			line := batchLine(b.flush(false).answer())
			for range n {
				text = append(append(text, line...), '\n')
			}
		}
	}
	for line := range bytes.Lines(body) {
		if line = bytes.Trim(line, " \t\r\n"); len(line) == 0 {
			continue
		}
		m, err := parseSend(line)
		if err != nil || m.event.data == nil || m.end {
			write()
			text = append(append(text, batchLine(g.take(m, err))...), '\n')
			continue
		}
		if b.s == nil || b.s.token != string(m.token) || !b.fits(len(line)) {
			write()
			b.s = g.lookup(m.token)
		}
		b.add(m.event)
	}
	write()
	return text
}

// batchLine returns the answer to a line of a batch, from the answer to the same as a body.
func batchLine(status int, body string) string {
	switch status {
	case http.StatusOK:
		return body
	case http.StatusBadRequest:
		return `{"status":400,` + body[1:]
	}
	return fmt.Sprintf(`{"status":%d}`, status)
}

// take carries out a send and returns the answer, also if err says that it could not be read.
func (g *gateway) take(m sendRequest, err error) (status int, body string) {
	if err == nil {
		b := burst{g: g, s: g.lookup(m.token), buf: chunkBuffers.Get().(*[]byte)}
		defer chunkBuffers.Put(b.buf)
		if m.event.data != nil {
			b.add(m.event)
		}
		return b.flush(m.end).answer()
	}
	g.met.events.with("invalid").Inc()
	e := errNotJSON
	errors.As(err, &e) // parseSend has no other
	return e.status, fmt.Sprintf(`{"error":%q}`, e.Text)
}

func (s sendStatus) answer() (status int, body string) {
	switch s {
	case sendWritten:
		return http.StatusOK, batchOK
	case sendBuffered:
		return http.StatusOK, batchBuffered
	}
	return http.StatusNotFound, `{"error":"unknown token"}`
}

// send is the way of a backend in the same process. It gives the events to the stream of token; see gatewayClient.send.
func (g *gateway) send(token string, events []event, end bool) (r sendResult) {
	b := burst{g: g, s: g.lookup([]byte(token)), buf: chunkBuffers.Get().(*[]byte)}
	defer chunkBuffers.Put(b.buf)
	write := func(end bool) {
		n := b.events
		status := b.flush(end)
		if status == sendUnknown { // and stays so
			r.err = errUnknownToken
			return
		}
		r.taken, r.buffered = r.taken+n, status == sendBuffered
	}
	var id []byte
	for _, e := range events {
		if !b.fits(len(e.Data)) {
			write(false)
		}
		id = e.appendID(id[:0])
		b.add(sentEvent{id: id, name: []byte(e.Name), data: []byte(e.Data), retry: e.Retry})
	}
	write(end)
	return r
}

// maxBurst is the most bytes that several events written at once may have.
const maxBurst = 64 << 10

// maxGrowth bounds how much longer an event is than its line: an escaped line end becomes a line end and "data: ".
const maxGrowth = 4

// burst is the events that are written to a stream at once. All of them are taken, or none.
type burst struct {
	g      *gateway
	s      *stream // nil if the token is unknown
	buf    *[]byte
	events int
}

// fits reports whether one more event may be written with the others, if its line or its data has this size. The
// stream's buffer must have room for what the socket may leave of them.
func (b *burst) fits(size int) bool {
	return b.events == 0 || len(*b.buf)+maxGrowth*size <= min(maxBurst, b.g.cfg.StreamBuffer)
}

func (b *burst) add(e sentEvent) {
	if b.events == 0 {
		*b.buf = reserveChunk(*b.buf)
	}
	*b.buf = appendEvent(*b.buf, e)
	b.events++
}

// flush gives the events to the stream, and ends it after them if end is set. Then b is empty.
func (b *burst) flush(end bool) sendStatus {
	status := sendUnknown
	if b.s != nil {
		var chunk []byte
		if b.events > 0 {
			chunk = b.s.chunk(b.buf)
		}
		status = b.s.send(chunk, end)
	}
	b.g.met.events.with(string(status)).Add(b.events)
	b.events = 0
	return status
}
