// The kinds of task that come with the program (add yours here), and what the work of a task may use. How a task is run
// is in tasks.go.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"
)

// taskFunc is the work of a task. It returns the result, which must have a JSON form, or an error whose text the
// browser sees. It should return soon after ctx ends, as its worker is busy until then. A panic fails the task.
type taskFunc func(ctx context.Context, p *reporter) (result any, err error)

// taskKind makes the work of a task from its params, a JSON object that may be empty. An error is the client's fault,
// and its text is sent to it.
type taskKind func(params object) (taskFunc, error)

// taskKinds returns the kinds of task that run in this process. To add one, write a taskKind and name it here.
func taskKinds() map[string]taskKind {
	return map[string]taskKind{
		"demo":    demoTask,
		"failing": failingTask,
	}
}

// badParam says what a param must be.
func badParam(format string, args ...any) error {
	return badRequest("bad_params", fmt.Sprintf(format, args...))
}

// demoTask takes some steps, with a pause before each.
func demoTask(params object) (taskFunc, error) {
	steps, err := numberParam(params, "steps", 3, 1, 10000)
	if err != nil || steps != math.Trunc(steps) {
		return nil, badParam("steps must be a whole number from 1 to 10000")
	}
	delay, badDelay := numberParam(params, "delay", 0.1, 0, 3600)
	message, badMessage := textParam(params, "message", "demo finished")
	if err := cmp.Or(badDelay, badMessage); err != nil {
		return nil, err
	}
	return func(ctx context.Context, p *reporter) (any, error) {
		for step := 1.0; step <= steps; step++ {
			if err := sleep(ctx, seconds(delay)); err != nil {
				return nil, err
			}
			p.Report(fmt.Sprintf("step %v of %v", step, steps), step/steps)
		}
		return map[string]any{"message": message, "steps": steps}, nil
	}, nil
}

// failingTask fails after a pause.
func failingTask(params object) (taskFunc, error) {
	delay, badDelay := numberParam(params, "delay", 0.1, 0, 3600)
	message, badMessage := textParam(params, "error_message", "task failed")
	if err := cmp.Or(badDelay, badMessage); err != nil {
		return nil, err
	}
	return func(ctx context.Context, p *reporter) (any, error) {
		if err := sleep(ctx, seconds(delay)); err != nil {
			return nil, err
		}
		return nil, errors.New(message)
	}, nil
}

// numberParam returns params[name], which must be from low to high, or byDefault if there is none.
func numberParam(params object, name string, byDefault, low, high float64) (float64, error) {
	raw, ok := params[name]
	if !ok {
		return byDefault, nil
	}
	value, err := parseNumber(raw)
	if err != nil || value < low || value > high {
		return 0, badParam("%s must be a number from %v to %v", name, low, high)
	}
	return value, nil
}

// textParam returns params[name], or byDefault if there is none.
func textParam(params object, name, byDefault string) (string, error) {
	value, ok, err := params.str(name)
	switch {
	case err != nil || len(value) > maxTaskText:
		return "", badParam("%s must be a string of at most %d bytes", name, maxTaskText)
	case !ok:
		return byDefault, nil
	}
	return value, nil
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

var errResultTooLarge = newError(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("result is larger than %d bytes", maxTaskResult))

func encodeResult(result any) (string, error) {
	encoded, err := json.Marshal(result)
	if err != nil {
		return "", errors.New("result has no JSON form")
	}
	return compactResult(encoded)
}

// compactResult returns a result as events carry it: without white space, and null if there is none.
func compactResult(encoded json.RawMessage) (string, error) {
	result := string(marshal(encoded))
	if len(result) > maxTaskResult {
		return "", errResultTooLarge
	}
	return result, nil
}

// usableFailure returns text as the error of a task: cut to maxTaskText, and never empty.
func usableFailure(text string) string { return cmp.Or(truncate(text), "task failed") }

// truncate cuts text to maxTaskText bytes and removes what is not UTF-8, such as half a character at the end. It does
// not keep the rest in memory.
func truncate(text string) string {
	if len(text) > maxTaskText {
		text = strings.Clone(text[:maxTaskText])
	}
	return strings.ToValidUTF8(text, "")
}

// reporter is how the work of a task reports its progress. Several goroutines may use it.
type reporter struct {
	s *TaskService
	t *task
}

// Report tells the followers how far the task is: value from 0 to 1, never falling, and a text, which is cut to 8 KiB.
// After the end of the task it does nothing. While the journal has no room the report is dropped, and counted.
func (p *reporter) Report(text string, value float64) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	switch {
	case p.t.status.finished():
	case p.s.journal.full():
		p.s.policy.dropped.Inc()
	default:
		text = truncate(text)
		p.s.reportLocked(p.t, report{text: &text, value: &value})
	}
}
