package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// POST /internal/send: how events come to the gateway.

const (
	maxSend  = 1 << 20 // bytes of a body, or of a line of a batch
	maxBatch = 4 << 20 // bytes of a batch
)

// sendRequest is the body of POST /internal/send. With neither an event nor
// end it only asks whether the stream is alive. All that is bytes is part of
// the body that it was read from.
type sendRequest struct {
	token []byte
	event sentEvent
	end   bool
}

var (
	errNoToken    = errors.New("token is missing or empty")
	errNoData     = errors.New("event data is missing")
	errEventField = errors.New("event name and id must not contain CR, LF or NUL")
)

// parseSend reads a body or a line, whose strings it decodes in place.
func parseSend(body []byte) (m sendRequest, err error) {
	if len(body) > maxSend {
		return m, errBodyTooLarge
	}
	var token, end []byte
	var e eventFields
	if err := pick(body, field{"token", &token, nil}, e.field(), field{"close", &end, nil}); err != nil {
		return m, err
	}
	if m.token, err = parseText(token); err == nil && len(m.token) == 0 {
		err = errNoToken
	}
	if err == nil {
		m.event, err = e.parse()
	}
	if err == nil && end != nil {
		m.end, err = parseBool(end)
	}
	return m, err
}

// eventFields are the member "event" of an object, and its members.
type eventFields struct{ text, id, name, data []byte }

func (f *eventFields) field() field {
	return field{"event", &f.text, []field{{"id", &f.id, nil}, {"name", &f.name, nil}, {"data", &f.data, nil}}}
}

func (f *eventFields) parse() (e sentEvent, err error) {
	switch {
	case f.text == nil:
		return e, nil
	case f.text[0] != '{':
		return e, errFieldType
	case f.data == nil:
		return e, errNoData
	}
	if e.id, err = parseText(f.id); err == nil {
		e.name, err = parseText(f.name)
	}
	if err == nil && !(isOneLine(e.id) && isOneLine(e.name)) {
		err = errEventField
	}
	if err == nil {
		e.data, err = parseText(f.data)
		e.oneLine = len(e.data) == len(f.data)-len(`""`) // an escape would be longer than what it says
	}
	return e, err
}

// parseText decodes a JSON string in place; that of an absent one is nil.
func parseText(raw []byte) ([]byte, error) {
	switch at(raw, 0) {
	case 0:
		return nil, nil
	case '"':
		return unquote(raw), nil
	}
	return nil, errFieldType
}

func parseBool(value []byte) (bool, error) {
	switch string(value) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errFieldType
}

// Bodies of /internal/send, and the frames made of them.
var (
	bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}
	frames = sync.Pool{New: func() any { return new([]byte) }}
)

// ndjson is the media type of a batch on /internal/send: a sendRequest a line.
const ndjson = "application/x-ndjson"

// The lines that answer a batch. A line for another reason has its status.
const (
	batchOK       = `{"status":"ok"}`
	batchBuffered = `{"status":"buffered"}`
	batchUnknown  = `{"status":404}`
)

// serveSend is POST /internal/send. If it can, it takes the connection over
// for the requests that will follow: see sendLoop.
func (g *gateway) serveSend(w http.ResponseWriter, r *http.Request) {
	mediaType, limit := jsonType, int64(maxSend)
	if hasMediaType(r, ndjson) {
		mediaType, limit = ndjson, maxBatch
	} else if !isJSON(r) {
		g.met.events.with("invalid").Inc()
		writeBodyError(w, errMediaType)
		return
	}
	buf := bodies.Get().(*bytes.Buffer)
	buf.Reset()
	body, err := readBody(w, r, limit, buf)
	if err != nil {
		g.met.events.with("invalid").Inc()
		writeBodyError(w, err)
		return
	}
	status, text := g.answerSend(nil, mediaType, body)
	bodies.Put(buf) // not deferred: keepSending lasts as long as the connection
	if r.ProtoAtLeast(1, 1) && !r.Close {
		if conn, rw, err := http.NewResponseController(w).Hijack(); err == nil {
			g.keepSending(conn, rw.Reader, appendAnswer(nil, new(httpDate).at(time.Now()), mediaType, status, text))
			return
		}
	}
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	w.Write(text)
}

// keepSending gives the answer on a connection that was taken over, and
// serves it from then on.
func (g *gateway) keepSending(conn net.Conn, read *bufio.Reader, answer []byte) {
	ahead, _ := read.Peek(read.Buffered())
	if r, ok := conn.(*returnedConn); ok {
		more, _ := io.ReadAll(r.first)
		ahead = append(ahead, more...)
		conn = r.TCPConn
	}
	conn.SetDeadline(time.Now().Add(sendIdle))
	if _, err := conn.Write(answer); err != nil {
		conn.Close()
		return
	}
	g.sendLoop(conn.(*net.TCPConn), ahead)
}

// answerSend does what the body of POST /internal/send says. It returns the
// status of the answer and its body, appended to text.
func (g *gateway) answerSend(text []byte, mediaType string, body []byte) (int, []byte) {
	if mediaType == ndjson {
		return http.StatusOK, g.answerBatch(text, body)
	}
	a := g.take(parseSend(body))
	name := `{"status":`
	if a.status != http.StatusOK {
		name = `{"error":`
	}
	return a.status, append(appendString(append(text, name...), a.result), "}\n"...)
}

// maxFrame is how many bytes several events have at most that are written at
// once.
const maxFrame = 64 << 10

// maxGrowth bounds how much longer an event is than its line: `\n` becomes a
// line end and "data: ".
const maxGrowth = 4

// answerBatch does what the lines of a batch say, and appends a line about
// each to text. Events in a row for the same stream are written at once: all or
// none of them are taken, so there must be room in the stream's buffer for what
// the socket may leave of them.
func (g *gateway) answerBatch(text, body []byte) []byte {
	var s *stream
	events := 0 // for s, in frame
	frame := frames.Get().(*[]byte)
	defer frames.Put(frame)
	write := func() {
		if events == 0 {
			return
		}
		status := s.send(s.chunk(frame), false)
		g.met.events.with(status.String()).Add(uint64(events))
		for ; events > 0; events-- {
			text = appendResult(text, status.answer())
		}
	}
	for line := range bytes.Lines(body) {
		if line = bytes.Trim(line, " \t\r\n"); len(line) == 0 {
			continue
		}
		m, err := parseSend(line)
		isEvent := err == nil && m.event.data != nil && !m.end
		joins := isEvent && events > 0 && string(m.token) == s.token &&
			len(*frame)+maxGrowth*len(line) <= min(maxFrame, s.limits.buffer)
		if !joins {
			write()
		}
		if isEvent && !joins {
			s = g.lookup(m.token)
			*frame = reserveChunk(*frame)
		}
		if !isEvent || s == nil {
			text = appendResult(text, g.take(m, err))
			continue
		}
		*frame = appendEvent(*frame, m.event)
		events++
	}
	write()
	return text
}

// sendAnswer is the answer to one send: what became of it, or the text of an
// error.
type sendAnswer struct {
	status int
	result string
}

// appendResult appends a line that answers one of a batch.
func appendResult(text []byte, a sendAnswer) []byte {
	text = append(text, `{"status":`...)
	switch a.status {
	case http.StatusOK:
		text = appendString(text, a.result)
	case http.StatusBadRequest:
		text = appendString(append(text, `400,"error":`...), a.result)
	default:
		text = strconv.AppendInt(text, int64(a.status), 10)
	}
	return append(text, "}\n"...)
}

// take does what a request says that was read, unless that failed.
func (g *gateway) take(m sendRequest, err error) sendAnswer {
	if err == nil {
		return g.send(m).answer()
	}
	g.met.events.with("invalid").Inc()
	if err == errBodyTooLarge { // a line; a body of its own has been refused
		return sendAnswer{http.StatusRequestEntityTooLarge, err.Error()}
	}
	return sendAnswer{http.StatusBadRequest, err.Error()}
}

func (s sendStatus) answer() sendAnswer {
	switch s {
	case sendWritten:
		return sendAnswer{http.StatusOK, "ok"}
	case sendBuffered:
		return sendAnswer{http.StatusOK, "buffered"}
	}
	return sendAnswer{http.StatusNotFound, errUnknownToken.Error()}
}

// send gives an event to its stream.
func (g *gateway) send(m sendRequest) sendStatus {
	status := sendGone
	s := g.lookup(m.token)
	switch {
	case m.event.data == nil && s == nil:
		return status
	case m.event.data == nil:
		return s.send(nil, m.end)
	case s != nil:
		frame := frames.Get().(*[]byte)
		defer frames.Put(frame)
		*frame = appendEvent(reserveChunk(*frame), m.event)
		status = s.send(s.chunk(frame), m.end)
	}
	g.met.events.with(status.String()).Inc()
	return status
}

// A backend posts its events over a few connections that stay open, and for
// each request net/http takes longer than the event's way to the browser. So
// once a connection has brought one POST /internal/send it is served here, by
// hand. This code knows requests in their plainest form only (RFC 9112); with
// any other it gives the connection back to net/http, unread.

const (
	sendIdle      = 2 * time.Minute // a silent connection is closed
	sendIdleSlack = 10 * time.Second
	sendBuffer    = 4 << 10   // bytes that a connection's buffer begins with
	sendBufferMax = 256 << 10 // a larger one is not kept between requests
)

// sendLoop serves conn; buf is what has been read of it already.
func (g *gateway) sendLoop(conn *net.TCPConn, buf []byte) {
	var text, answer []byte
	var date httpDate
	var deadline time.Time
	now := time.Now()
	for {
		mediaType, head, size, plain := parsePlainSend(buf)
		if !plain {
			conn.SetDeadline(time.Time{})
			g.returned.give(&returnedConn{conn, bytes.NewReader(buf)})
			return
		}
		if size > 0 && len(buf) >= size {
			var status int
			status, text = g.answerSend(text[:0], mediaType, buf[head:size])
			answer = appendAnswer(answer[:0], date.at(now), mediaType, status, text)
			if _, err := conn.Write(answer); err != nil {
				conn.Close()
				return
			}
			rest := buf[size:]
			if cap(buf) > sendBufferMax {
				buf = nil
			}
			if cap(text) > sendBufferMax {
				text, answer = nil, nil
			}
			buf = append(buf[:0], rest...)
			continue
		}
		if deadline.Sub(now) < sendIdle-sendIdleSlack { // not each time: it costs a timer
			deadline = now.Add(sendIdle)
			conn.SetDeadline(deadline)
		}
		buf = growBuffer(buf, size)
		n, err := conn.Read(buf[len(buf):cap(buf)])
		now = time.Now()
		buf = buf[:len(buf)+n]
		if err != nil {
			conn.Close()
			return
		}
	}
}

// growBuffer makes room in buf for a request of size bytes, or for more of
// one whose size is not known yet. Of a large one it makes room as it comes:
// a head alone must not take megabytes.
func growBuffer(buf []byte, size int) []byte {
	switch {
	case len(buf) < cap(buf) && (size <= cap(buf) || cap(buf) >= sendBufferMax):
		return buf
	case size == 0:
		size = max(sendBuffer, 2*cap(buf))
	default:
		size = min(size, max(sendBufferMax, 2*cap(buf)))
	}
	return append(make([]byte, 0, size), buf...)
}

const plainSend = "POST /internal/send HTTP/1.1\r\n"

// hostBytes are those of a host and port. harmless are the headers that HTTP
// clients add by themselves, and that mean nothing here.
const hostBytes = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-_:[]"

var harmless = []string{"user-agent", "accept-encoding", "accept", "accept-language", "sec-fetch-mode", "traceparent", "tracestate"}

// parsePlainSend looks at the head of a request. size is that of the whole
// request, 0 while the head is incomplete; plain is false if the request is
// anything but a POST /internal/send with a Content-Length.
func parsePlainSend(buf []byte) (mediaType string, head, size int, plain bool) {
	if n := min(len(buf), len(plainSend)); string(buf[:n]) != plainSend[:n] {
		return "", 0, 0, false
	}
	head = bytes.Index(buf, []byte("\r\n\r\n")) + 4
	if head <= len(plainSend) {
		return "", 0, 0, head < 4 && len(buf) <= maxHeader
	}
	length, hosts := -1, 0
	for rest := buf[len(plainSend) : head-2]; len(rest) > 0; {
		line, after, _ := bytes.Cut(rest, []byte("\r\n"))
		rest = after
		field, value, ok := bytes.Cut(line, []byte(":"))
		value = bytes.Trim(value, " \t")
		if !ok || !isPlain(field) || !isPlain(value) {
			return "", 0, 0, false
		}
		switch name := string(field); {
		case strings.EqualFold(name, "host"):
			hosts++
			ok = len(value) > 0 && len(bytes.Trim(value, hostBytes)) == 0
		case strings.EqualFold(name, "content-length"):
			n, err := strconv.ParseUint(string(value), 10, 31)
			ok = err == nil && length < 0
			length = int(n)
		case strings.EqualFold(name, "content-type"):
			ok = mediaType == ""
			switch string(value) {
			case jsonType:
				mediaType = jsonType
			case ndjson:
				mediaType = ndjson
			default:
				ok = false
			}
		case strings.EqualFold(name, "connection"):
			ok = strings.EqualFold(string(value), "keep-alive")
		default: // others may change what the request means
			ok = slices.ContainsFunc(harmless, func(known string) bool { return strings.EqualFold(name, known) })
		}
		if !ok {
			return "", 0, 0, false
		}
	}
	fits := mediaType == jsonType && length <= maxSend || mediaType == ndjson && length <= maxBatch
	return mediaType, head, head + length, fits && length >= 0 && hosts == 1
}

// isPlain reports whether part of a header has nothing but visible ASCII and
// spaces.
func isPlain(part []byte) bool {
	for _, c := range part {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// httpDate is a Date header's value, made anew once a second.
type httpDate struct {
	second int64
	text   []byte
}

func (d *httpDate) at(now time.Time) []byte {
	if second := now.Unix(); second != d.second {
		d.second, d.text = second, now.UTC().AppendFormat(d.text[:0], http.TimeFormat)
	}
	return d.text
}

// appendAnswer appends a response.
func appendAnswer(b, date []byte, mediaType string, status int, body []byte) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, "\r\nContent-Type: "...)
	b = append(b, mediaType...)
	b = append(b, "\r\nDate: "...)
	b = append(b, date...)
	b = append(b, "\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	return append(b, body...)
}

// returnedConn is a connection whose first bytes have been read already.
type returnedConn struct {
	*net.TCPConn
	first *bytes.Reader
}

func (c *returnedConn) Read(b []byte) (int, error) {
	if c.first.Len() > 0 {
		return c.first.Read(b)
	}
	return c.TCPConn.Read(b)
}

// returnListener accepts the connections that sendLoop gives back.
type returnListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newReturnListener() *returnListener {
	return &returnListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *returnListener) give(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		c.Close()
	}
}

func (l *returnListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *returnListener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *returnListener) Addr() net.Addr { return &net.TCPAddr{} }
