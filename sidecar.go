// The gateway role: who may open a stream is asked of the backend here, who left is
// told to it, and all streams are ended in order. One stream is in stream.go, how
// events come is in send.go. Tasks, versions and identifiers are not known here.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	maxTarget      = 8 << 10 // bytes of a stream's request target; beyond it 414
	maxHeader      = 16 << 10
	maxAnswer      = 1 << 20 // bytes of a connect callback's answer that are looked at
	callbackLimit  = 5 * time.Second
	callbackBuffer = 2 << 10 // bytes that a connection to the backend buffers each way

	// At most so many callbacks are under way. A connect callback waits for
	// its turn within callbackLimit, a disconnect callback for disconnectLimit;
	// then it is given up, and counted as a timeout.
	maxConnecting    = 256
	maxDisconnecting = 32
	disconnectLimit  = 30 * time.Second

	// askingGrace is how long connect callbacks may still take in a shutdown;
	// then their clients are told to come back.
	askingGrace = 2 * time.Second

	// Streams that end together do so one after the other, a millisecond apart
	// but within endSpread in all, lest the browsers return in one wave.
	endSpread = 3 * time.Second
)

// gateway is the gateway role: it holds the browsers' streams, asks the
// backend who may connect, tells it who left, and takes events from it.
type gateway struct {
	cfg       gatewayConfig
	limits    streamLimits
	log       *slog.Logger
	met       *gatewayMetrics
	transport http.RoundTripper

	connecting    chan struct{} // a slot for each connect callback under way
	disconnecting chan struct{}
	asking        context.Context // of connect callbacks
	stopAsking    context.CancelFunc

	returned *returnListener // connections that sendLoop gives back to net/http

	name     string        // of this run of the gateway
	requests atomic.Uint64 // for streams, so far

	shards  [16]shard    // by the token's last digit
	count   atomic.Int64 // registered streams
	closing atomic.Bool  // shutting down: nothing new is taken

	// busy counts stream requests until their answer, streams until their end,
	// disconnect callbacks, and resets. It is no WaitGroup because a request that is
	// turned away may still raise it from zero while shutdown waits.
	busy atomic.Int64
}

// shard is a part of the streams. A heartbeat visits one shard at a time, so
// that the writes spread over the whole interval.
type shard struct {
	mu      sync.Mutex         // guards streams
	streams map[string]*stream // by token
}

func newGateway(cfg gatewayConfig, log *slog.Logger, met *gatewayMetrics) *gateway {
	asking, stopAsking := context.WithCancel(context.Background())
	g := &gateway{
		cfg:    cfg,
		limits: streamLimits{buffer: cfg.StreamBuffer, writeTimeout: cfg.WriteTimeout},
		log:    log,
		met:    met,
		transport: &http.Transport{
			DialContext:         dial,
			TLSHandshakeTimeout: dialLimit,
			MaxIdleConnsPerHost: maxConnecting + maxDisconnecting,
			IdleConnTimeout:     10 * time.Second, // after a storm they would cost more than the streams
			ReadBufferSize:      callbackBuffer,
			WriteBufferSize:     callbackBuffer,
			DisableCompression:  true,
		},
		connecting:    make(chan struct{}, maxConnecting),
		disconnecting: make(chan struct{}, maxDisconnecting),
		asking:        asking,
		stopAsking:    stopAsking,
		returned:      newReturnListener(),
		name:          newEpoch(),
	}
	for i := range g.shards {
		g.shards[i].streams = map[string]*stream{}
	}
	return g
}

// serveStream answers every request that is not for one of the gateway's own
// paths: it opens a stream if the backend accepts it.
func (g *gateway) serveStream(w http.ResponseWriter, r *http.Request) {
	g.busy.Add(1)
	defer g.busy.Add(-1)
	if origin := g.cfg.CORSAllowOrigin; origin != "" {
		w.Header().Set("Access-Control-Allow-Origin", origin)
		if origin != "*" {
			w.Header().Set("Access-Control-Allow-Credentials", "true")
		}
	}
	switch {
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		writeError(w, newError(http.StatusMethodNotAllowed, "", "a stream is opened with GET"))
		return
	case r.ContentLength != 0:
		writeError(w, newError(http.StatusBadRequest, "", "a stream request has no body"))
		return
	case len(r.RequestURI) > maxTarget:
		writeError(w, newError(http.StatusRequestURITooLong, "", "request target too long"))
		return
	case !utf8.ValidString(r.RequestURI):
		writeError(w, newError(http.StatusBadRequest, "", "request target is not UTF-8"))
		return
	case g.cfg.CallbackURL == "":
		g.refuse(w, r, http.StatusServiceUnavailable, "no callback URL configured")
		return
	}
	s := g.register(r)
	if s == nil {
		g.refuse(w, r, http.StatusServiceUnavailable, "no capacity")
		return
	}
	status, text, answer := g.connect(r, s)
	if status != 0 {
		g.unregister(s)
		if answer != nil { // the backend holds a connection that never was
			g.spawn(func() { g.disconnect(s, streamError) })
		}
		g.refuse(w, r, status, text)
		return
	}
	g.open(w, r, s, answer)
}

// register makes a stream for the request, or returns nil if there is no room
// or the gateway is shutting down.
func (g *gateway) register(r *http.Request) *stream {
	if n := g.count.Add(1); g.cfg.MaxConnections > 0 && n > int64(g.cfg.MaxConnections) {
		g.count.Add(-1)
		return nil
	}
	s := &stream{token: newToken(), request: encodeRequest(r), chunked: r.ProtoAtLeast(1, 1), limits: &g.limits}
	sh := g.shard(s.token[len(s.token)-1])
	sh.mu.Lock()
	sh.streams[s.token] = s
	sh.mu.Unlock()
	if g.closing.Load() { // after it is in the map, so that shutdown misses none
		g.unregister(s)
		return nil
	}
	return s
}

func (g *gateway) unregister(s *stream) {
	sh := g.shard(s.token[len(s.token)-1])
	sh.mu.Lock()
	delete(sh.streams, s.token)
	sh.mu.Unlock()
	g.count.Add(-1)
}

// shard returns the shard of the tokens with this last digit.
func (g *gateway) shard(digit byte) *shard {
	return &g.shards[(digit&15+digit>>6*9)%16] // hexadecimal, in lower case
}

// lookup returns the stream of a token, which is not empty.
func (g *gateway) lookup(token []byte) *stream {
	sh := g.shard(token[len(token)-1])
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.streams[string(token)]
}

// refuse answers a request that gets no stream. A browser's EventSource gives
// up for good on any status but 200 (WHATWG HTML section 9.2.3), so transient
// trouble is told to it as a stream that ends: it comes back by itself.
func (g *gateway) refuse(w http.ResponseWriter, r *http.Request, status int, text string) {
	transient := status >= 500 || status == http.StatusRequestTimeout ||
		status == http.StatusTooEarly || status == http.StatusTooManyRequests
	retry := g.retry()
	if transient && acceptsEventStream(r) {
		setStreamHeader(w.Header())
		w.Write(appendComment(appendRetry(nil, retry), text))
		return
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa((retry+999)/1000))
	}
	writeError(w, newError(status, "", text))
}

// retry is a reconnection time in milliseconds, different for each stream so
// that browsers that lost theirs together do not return together.
func (g *gateway) retry() int {
	return int(jitter(g.cfg.Retry, 2*g.cfg.Retry).Milliseconds())
}

func acceptsEventStream(r *http.Request) bool {
	return slices.ContainsFunc(r.Header.Values("Accept"), func(v string) bool {
		return strings.Contains(strings.ToLower(v), "text/event-stream")
	})
}

func setStreamHeader(h http.Header) {
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-cache, no-transform")
	h.Set("X-Accel-Buffering", "no") // nginx
}

// open takes the connection over from net/http, whose buffers and goroutine
// would cost several times what the stream itself does, and begins it.
func (g *gateway) open(w http.ResponseWriter, r *http.Request, s *stream, a *callbackAnswer) {
	header := w.Header()
	setStreamHeader(header)
	header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	header.Set("Connection", "close")
	if s.chunked {
		header.Set("Transfer-Encoding", "chunked")
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	var raw syscall.RawConn
	if err == nil {
		raw, err = conn.(syscall.Conn).SyscallConn()
	}
	if err != nil {
		g.log.Error("taking over a connection", "err", err)
		g.unregister(s)
		g.spawn(func() { g.disconnect(s, streamError) })
		return
	}
	var head bytes.Buffer
	head.WriteString("HTTP/1.1 200 OK\r\n")
	header.Write(&head)
	head.WriteString("\r\n")
	first := appendRetry(reserveChunk(nil), g.retry())
	if a.event.data != nil {
		first = appendEvent(first, a.event)
	}
	head.Write(s.chunk(&first))

	g.met.opened.Inc()
	g.log.Debug("stream opened", "token", mask(s.token))
	s.open(conn, raw, head.Bytes(), a.end, g.cfg.MaxStream)
	if rw.Reader.Buffered() > 0 {
		s.end(clientClosed) // it sent more than its request
	}
	g.spawn(func() { g.watch(s) })
}

// watch waits for the end of an open stream. The parked Read returns when the
// client leaves or sends anything, or when the gateway has closed conn.
func (g *gateway) watch(s *stream) {
	s.conn.Read(make([]byte, 1))
	s.end(clientClosed)
	s.conn.Close()
	g.unregister(s)
	g.met.closed.with(s.reason).Inc()
	g.log.Debug("stream closed", "token", mask(s.token), "reason", s.reason)
	g.disconnect(s, s.reason)
}

func (g *gateway) spawn(f func()) {
	g.busy.Add(1)
	go func() {
		defer g.busy.Add(-1)
		f()
	}()
}

// connect asks the backend whether s may be opened. Status 0 means yes;
// otherwise it is the status for the client. An answer beside a status means
// that the backend accepted and then did not finish its answer.
func (g *gateway) connect(r *http.Request, s *stream) (status int, text string, answer *callbackAnswer) {
	order := fmt.Sprintf("%s-%d", g.name, g.requests.Add(1))
	ctx, cancel := context.WithTimeout(g.asking, callbackLimit)
	defer cancel()
	select {
	case g.connecting <- struct{}{}:
		defer func() { <-g.connecting }()
	case <-ctx.Done():
		g.met.callbacks.with("connect", outcome(0, ctx.Err())).Inc()
		status, text = explain(ctx.Err())
		return status, text, nil
	case <-r.Context().Done(): // the client left before the backend was asked
		return http.StatusServiceUnavailable, "client left", nil
	}
	if hasLeft(r) {
		return http.StatusServiceUnavailable, "client left", nil
	}
	code, body, err := g.call(ctx, "connect", "", s, order)
	switch {
	case err == nil && code/100 == 2:
		return 0, "", g.parseAnswer(body)
	case code >= 300:
		return code, "connection rejected", nil
	case code/100 == 2:
		answer = &callbackAnswer{}
	}
	status, text = explain(err)
	return status, text, answer
}

// hasLeft reports whether the client has closed its connection. It looks for
// itself, as the request's context may not know yet. A browser that has tried
// again left before, so if its first attempt comes to be numbered after its
// second, this is seen here, and the second is not taken for a replaced tab.
func hasLeft(r *http.Request) (left bool) {
	conn, ok := r.Context().Value(connKey{}).(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) { // not Read, for which net/http holds a lock
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		left = n == 0 || err != nil && err != syscall.EAGAIN && err != syscall.EINTR
	})
	return left || err != nil
}

// explain tells a client why the backend was not heard.
func explain(err error) (status int, text string) {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout, "backend too slow"
	case errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable, "shutting down"
	}
	return http.StatusServiceUnavailable, "backend unreachable"
}

// disconnect makes the disconnect callback of an accepted stream: once, with
// no retry. The stream itself has ended before.
func (g *gateway) disconnect(s *stream, reason string) {
	turn, cancel := context.WithTimeout(context.Background(), disconnectLimit)
	defer cancel()
	select {
	case g.disconnecting <- struct{}{}:
		defer func() { <-g.disconnecting }()
	case <-turn.Done():
		g.met.callbacks.with("disconnect", "timeout").Inc()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), callbackLimit)
	defer cancel()
	g.call(ctx, "disconnect", reason, s, "")
}

// call makes one callback and counts it. The status is set as soon as the
// backend sent one, also when its body then failed.
func (g *gateway) call(ctx context.Context, action, reason string, s *stream, order string) (status int, body []byte, err error) {
	start := time.Now()
	status, body, err = g.post(ctx, encodeCallback(action, reason, s), order)
	g.met.callbackSeconds.with(action).observe(time.Since(start).Seconds())
	g.met.callbacks.with(action, outcome(status, err)).Inc()
	if err != nil {
		g.log.Warn("callback failed", "action", action, "err", err)
	}
	return status, body, err
}

// outcome is what became of a callback, as the metrics have it.
func outcome(status int, err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case err != nil:
		return "error"
	case status/100 != 2:
		return "rejected"
	}
	return "accepted"
}

func (g *gateway) post(ctx context.Context, payload []byte, order string) (status int, body []byte, err error) {
	header := http.Header{"Content-Type": {jsonType}, featuresHeader: {featureBatch + ", id"}}
	if order != "" {
		header.Set(orderHeader, order)
	}
	status, body, err = postTo(ctx, g.transport, string(g.cfg.CallbackURL), header, payload, maxAnswer+1)
	if status >= 300 {
		err = nil // nobody needs that body
	}
	return status, body, err
}

// parseAnswer reads {"event":{…},"close":true} from a connect callback's
// answer. What is not understood is left out: the backend did accept.
func (g *gateway) parseAnswer(body []byte) *callbackAnswer {
	a := &callbackAnswer{}
	if len(bytes.TrimSpace(body)) == 0 {
		return a
	}
	var e eventFields
	var end []byte
	var err error = errBodyTooLarge
	if len(body) <= maxAnswer {
		err = pick(body, e.field(), field{"close", &end, nil})
	}
	if err != nil {
		g.log.Warn("ignoring the callback's answer", "err", err)
		return a
	}
	if a.event, err = e.parse(); err != nil {
		g.log.Warn("ignoring the event in the callback's answer", "err", err)
	}
	if end != nil {
		if a.end, err = parseBool(end); err != nil {
			g.log.Warn("ignoring close in the callback's answer", "err", err)
		}
	}
	return a
}

// work starts what the gateway does besides answering, until ctx ends.
func (g *gateway) work(ctx context.Context) {
	go g.beat(ctx)
	go g.summarize(ctx)
}

// summarize logs once a minute what happened, if anything did: single streams
// are for debugging.
func (g *gateway) summarize(ctx context.Context) {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	for before := uint64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if opened := g.met.opened.Load(); opened != before {
			g.log.Info("streams", "open", g.count.Load(), "opened", opened-before)
			before = opened
		}
	}
}

// beat writes the heartbeats and cuts the clients that are stuck, until ctx
// ends. After a round of heartbeats in which streams were opened it also gives
// memory back: opening a stream uses several times what the stream keeps.
func (g *gateway) beat(ctx context.Context) {
	go g.walk(ctx, g.cfg.WriteTimeout/4, (*stream).look, func() {})
	before := g.met.opened.Load()
	g.walk(ctx, g.cfg.Heartbeat, (*stream).beat, func() {
		if opened := g.met.opened.Load(); opened != before {
			before = opened
			debug.FreeOSMemory()
		}
	})
}

// walk visits every stream once an interval, one shard after the other, until
// ctx ends. It calls done after each round.
func (g *gateway) walk(ctx context.Context, interval time.Duration, visit func(*stream), done func()) {
	ticker := time.NewTicker(interval / time.Duration(len(g.shards)))
	defer ticker.Stop()
	for {
		for i := range g.shards {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
			for _, s := range g.shards[i].all() {
				visit(s)
			}
		}
		done()
	}
}

func (sh *shard) all() []*stream {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return slices.AppendSeq(make([]*stream, 0, len(sh.streams)), maps.Values(sh.streams))
}

// shutdown takes no new streams, ends those that are open, spread over time,
// and waits for their disconnect callbacks. When ctx ends it gives up.
func (g *gateway) shutdown(ctx context.Context) {
	g.closing.Store(true)
	time.AfterFunc(askingGrace, g.stopAsking)
	g.endAll(ctx, g.all())
	for g.busy.Load() > 0 {
		select {
		case <-ctx.Done():
			g.log.Warn("ending with streams or disconnect callbacks under way", "count", g.busy.Load())
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (g *gateway) all() (streams []*stream) {
	for i := range g.shards {
		streams = append(streams, g.shards[i].all()...)
	}
	return streams
}

// endAll ends the streams, a few each millisecond.
func (g *gateway) endAll(ctx context.Context, streams []*stream) {
	step := len(streams)/int(endSpread/(2*time.Millisecond)) + 1 // a timer may be late by as much again
	for batch := range slices.Chunk(streams, step) {
		for _, s := range batch {
			s.finish()
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
		}
	}
}

// serveReset is POST /internal/reset, by which a backend that has just begun
// says that it knows none of the streams. They end, and the browsers come
// back. It shows the secret that CALLBACK_URL has, if it has one.
func (g *gateway) serveReset(w http.ResponseWriter, r *http.Request) {
	want := ""
	if u, err := url.Parse(string(g.cfg.CallbackURL)); err == nil {
		want = u.Query().Get("secret")
	}
	switch {
	case !isJSON(r): // a form of another site has no such type
		writeError(w, errMediaType)
		return
	case want != "" && !hasBearer(r, secret(want)):
		writeError(w, errWrongSecret)
		return
	}
	streams := g.all() // before the answer, after which there may be new ones
	g.log.Info("ending the streams of an earlier backend", "streams", len(streams))
	g.spawn(func() { g.endAll(context.Background(), streams) })
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// gauges registers the gateway's gauges.
func (g *gateway) gauges(reg *registry) {
	reg.gauge("gateway_streams", "Streams that are open or being opened.", label{}, func() map[string]float64 {
		return map[string]float64{"": float64(g.count.Load())}
	})
}

// serveReady is GET /readyz.
func (g *gateway) serveReady(w http.ResponseWriter, r *http.Request) {
	configured := g.cfg.CallbackURL != ""
	status, text := http.StatusOK, "ready"
	if !configured || g.closing.Load() {
		status, text = http.StatusServiceUnavailable, "not_ready"
	}
	writeJSON(w, status, map[string]any{"status": text, "configured": configured})
}
