// The backend's client of a gateway. The gateway itself is in sidecar.go, send.go and stream.go; what the two say to
// each other is in wire.go. Identifiers are not known here; see connmgr.go.

package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendLimit bounds one POST to the gateway. It is tried once.
	sendLimit = 5 * time.Second
	// resetLimit bounds how long a start waits for a gateway. If it does not answer by then it is asked again, with a
	// pause of resetPause.
	resetLimit = time.Second
	resetPause = time.Second

	// maxPostingBatches bounds the POSTs under way to a gateway that takes batches: sends that come meanwhile go out
	// together. To any other gateway it is maxPosting, with one event in each.
	maxPostingBatches = 4
	maxPosting        = 128

	// The most that a batch holds. It is far below the gateway's limit, so that nobody waits long for the events of
	// others.
	maxBatchSends = 512
	maxBatchBytes = 1 << 20
)

// gatewayClient sends events to a gateway by POST /internal/send.
//
// A lone send goes out at once. Under load it is group commit: sends that come while others are under way wait, and go
// out together then. A caller waits for the result before it sends more events of the same token, so their order is
// kept.
type gatewayClient struct {
	url       string            // base URL
	transport http.RoundTripper // no http.Client, which costs more and follows redirects

	features atomic.Pointer[features] // nil until a gateway has called back

	mu      sync.Mutex     // guards the rest
	posting int            // goroutines that post, each one POST after the other
	waiting []*waitingSend // at most one with events for each connection, and probes and ends
}

// waitingSend is a send that waits for its result.
type waitingSend struct {
	lines  int    // lines of JSON in body
	skips  bool   // an event that is refused for good is skipped, and the stream goes on
	body   []byte // each line with its newline
	result sendResult
	done   sync.WaitGroup
}

// sendResult is what became of one send.
type sendResult struct {
	taken    int   // how many events the gateway took, or refused for good
	refused  int   // how many of them it refused
	buffered bool  // the last of them waits for the stream to open
	err      error // why no more: errUnknownToken, or one after which the next event may have been taken or not
}

func newGatewayClient(baseURL string) *gatewayClient {
	return &gatewayClient{
		url: baseURL,
		transport: &http.Transport{
			DialContext:         dial,
			TLSHandshakeTimeout: dialLimit,
			MaxIdleConnsPerHost: maxPosting,
			IdleConnTimeout:     4 * time.Second, // before a Node.js gateway closes them, after 5
			WriteBufferSize:     16 << 10,        // most batches go out in one write
			DisableCompression:  true,
		},
	}
}

// heard notes what the gateway says it can do.
func (c *gatewayClient) heard(f features) { c.features.Store(&f) }

// can returns what the gateway has said it can do.
func (c *gatewayClient) can() features {
	if f := c.features.Load(); f != nil {
		return *f
	}
	return features{}
}

// send gives the events to the stream of token, one after the other, or only the first one if the gateway takes no
// batches. If end is set there is one event at most, and the stream ends after it. Without events and end it asks
// whether the stream is there.
func (c *gatewayClient) send(token string, events []event, end bool) sendResult {
	can, limit := c.can(), maxPostingBatches
	if !can.batch {
		events, limit = events[:min(len(events), 1)], maxPosting
	}
	s := &waitingSend{lines: max(len(events), 1), skips: !end && len(events) > 0, body: encodeSends(token, events, end, can)}
	s.done.Add(1)
	c.mu.Lock()
	c.waiting = append(c.waiting, s)
	if c.posting < limit {
		c.posting++
		go c.post()
	}
	c.mu.Unlock()
	s.done.Wait()
	return s.result
}

// post posts what waits until nothing does.
func (c *gatewayClient) post() {
	for {
		runtime.Gosched() // lets others that are about to send join the batch
		batch := c.take()
		if len(batch) == 0 {
			return
		}
		if len(batch) == 1 && (batch[0].lines == 1 || !c.can().batch) {
			batch[0].result = c.postOne(batch[0])
		} else if err := c.postBatch(batch); err != nil {
			for _, s := range batch {
				s.result = sendResult{err: err}
			}
		}
		for _, s := range batch {
			s.done.Done()
		}
	}
}

// take returns the sends that go out next. If there are none, a goroutine fewer posts.
func (c *gatewayClient) take() (batch []*waitingSend) {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines, size := 0, 0
	for _, s := range c.waiting {
		lines += s.lines
		size += len(s.body)
		if len(batch) > 0 && (!c.can().batch || lines > maxBatchSends || size > maxBatchBytes) {
			break
		}
		batch = append(batch, s)
	}
	if len(batch) == 0 {
		c.posting--
	}
	c.waiting = slices.Delete(c.waiting, 0, len(batch))
	return batch
}

// reset asks the gateway to end all streams that it has: they are those of an earlier backend, perhaps one that was
// killed, and their browsers would wait for ever. If the first try is not answered, it goes on in the background until
// ctx ends, or until a gateway calls back that announces no features, and so knows no reset. Streams that this backend
// has by then end as well, and come back.
func (c *gatewayClient) reset(ctx context.Context, callbackSecret secret, log *slog.Logger) {
	err := c.tryReset(ctx, resetLimit, callbackSecret, log)
	if err == nil {
		return
	}
	log.Warn("the gateway does not answer yet", "err", err)
	go func() {
		for err != nil {
			if sleep(ctx, resetPause) != nil {
				return
			}
			if f := c.features.Load(); f != nil && !f.known {
				return
			}
			// For longer than before, or a slow gateway would be reset again and again.
			err = c.tryReset(ctx, sendLimit, callbackSecret, log)
		}
		log.Info("the gateway answers now")
	}()
}

// tryReset returns an error unless the gateway itself answered. A proxy in front of it may answer anything.
func (c *gatewayClient) tryReset(ctx context.Context, limit time.Duration, callbackSecret secret, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	header := http.Header{"Content-Type": {jsonType}, "Authorization": {"Bearer " + string(callbackSecret)}}
	status, answer, err := postTo(ctx, c.transport, c.url+"/internal/reset", header, []byte("{}"), maxBatchBytes)
	o, _ := parseObject(answer)
	switch {
	case err != nil:
		return err
	case status == http.StatusUnauthorized && o["error"] != nil:
		log.Warn("the gateway has another callback secret: is SSE_CALLBACK_SECRET the one in its CALLBACK_URL?")
		return nil
	case status == http.StatusOK && o["status"] != nil:
		return nil
	}
	return c.statusError(status)
}

// statusError says what a status means that is not one of the gateway's own answers.
func (c *gatewayClient) statusError(status int) error {
	if status == http.StatusNotFound || status == http.StatusMethodNotAllowed {
		return fmt.Errorf("the gateway at %s does not serve /internal/send: is INTERNAL_ADDR set there?", c.url)
	}
	return fmt.Errorf("posting to the gateway: status %d", status)
}

// postOne posts the first line of s.
func (c *gatewayClient) postOne(s *waitingSend) sendResult {
	line, _, _ := bytes.Cut(s.body, []byte("\n"))
	status, answer, err := c.do(jsonType, line)
	if err != nil {
		return sendResult{err: err}
	}
	anyWords := !c.can().known // will do: another make of gateway has its own
	words := string(bytes.TrimSpace(answer))
	if status == http.StatusOK && (words == batchOK || words == batchBuffered || anyWords) {
		return sendResult{taken: 1, buffered: strings.Contains(words, `"buffered"`)}
	}
	o, _ := parseObject(answer)
	said, _, _ := o.str("error")
	switch {
	case status == http.StatusNotFound && (said == errUnknownToken.Error() || anyWords):
		return sendResult{err: errUnknownToken}
	case (status == http.StatusBadRequest || status == http.StatusRequestEntityTooLarge) && (said != "" || anyWords) && s.skips:
		return sendResult{taken: 1, refused: 1}
	}
	return sendResult{err: c.statusError(status)} // something in between has answered, or it is no gateway
}

// postBatch posts the batch and sets the results, unless it returns an error.
func (c *gatewayClient) postBatch(batch []*waitingSend) error {
	want := 0
	var bodies [][]byte
	for _, s := range batch {
		want += s.lines
		bodies = append(bodies, s.body)
	}
	status, answer, err := c.do(ndjson, slices.Concat(bodies...))
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return c.statusError(status)
	}
	lines := bytes.Split(bytes.TrimSpace(answer), []byte("\n"))
	if len(lines) != want {
		return fmt.Errorf("reading the answer: %d results to a batch of %d", len(lines), want)
	}
	for _, s := range batch {
		s.result = readResult(lines[:s.lines], s.skips)
		lines = lines[s.lines:]
	}
	return nil
}

// readResult reads the lines that answer one send.
func readResult(lines [][]byte, skips bool) (r sendResult) {
	for _, line := range lines {
		refused := bytes.HasPrefix(line, []byte(`{"status":400`)) || bytes.HasPrefix(line, []byte(`{"status":413`))
		switch answer := string(line); {
		case answer == batchOK, answer == batchBuffered:
			r.buffered = answer == batchBuffered
		case answer == batchUnknown:
			r.err = errUnknownToken
			return r
		case refused && skips:
			r.refused++
		default:
			r.err = fmt.Errorf("reading the answer: %q", line)
			return r
		}
		r.taken++
	}
	return r
}

func (c *gatewayClient) do(contentType string, body []byte) (status int, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), sendLimit)
	defer cancel()
	return postTo(ctx, c.transport, c.url+"/internal/send", http.Header{"Content-Type": {contentType}}, body, maxBatchBytes)
}
